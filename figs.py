import json,base64,sys
nb=json.load(open("/work/wt/redundancy/nbs/06_curate/redundancy.ipynb"))
for i,c in enumerate(nb["cells"]):
    for j,o in enumerate(c.get("outputs",[])):
        d=o.get("data",{})
        if "image/png" in d: open(f"/tmp/team/red/f{i}.png","wb").write(base64.b64decode(d["image/png"])); print(i,"png")
        elif "text/markdown" in d: print(i,"".join(d["text/markdown"]))
        elif "text/plain" in d: print(i,"".join(d["text/plain"])[:2500])
        elif "text" in o: print(i,"".join(o["text"]))
