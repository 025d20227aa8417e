"Install ptbook. The settings are in settings.ini; a wheel also carries the notebooks, the results and the list of papers."
from configparser import ConfigParser
from pathlib import Path
from shutil import copy2

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(HERE/"settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]


class BuildBook(build_py):
    "Copy what a reader without the repository needs to `ptbook/_book`."
    def run(self):
        super().run()
        if self.editable_mode: return
        book = Path(self.build_lib)/"ptbook"/"_book"
        for pattern in ("papers.tsv", "results/*.json", "results/speed/*.json", "results/trust/*.json", "nbs/**/*.ipynb", "nbs/assets/launch/*.yaml"):
            for source in HERE.glob(pattern):
                if ".ipynb_checkpoints" in source.parts: continue
                target = book/source.relative_to(HERE)
                target.parent.mkdir(parents=True, exist_ok=True)
                copy2(source, target)


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(HERE/"README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="Apache-2.0",
    url=cfg["git_url"],
    keywords=cfg["keywords"].split(),
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Science/Research",
                 "Intended Audience :: Education", "Natural Language :: English",
                 *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14))],
    packages=find_packages(include=["ptbook", "ptbook.*"]),
    python_requires=">=" + cfg["min_python"],
    install_requires=cfg["requirements"].split(),
    extras_require={"peft": cfg["peft_requirements"].split(), "scale": cfg["scale_requirements"].split(), "site": cfg["site_requirements"].split(),
                    "dev": cfg["dev_requirements"].split()},
    entry_points={"console_scripts": cfg["console_scripts"].split("\n"),
                  "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
    cmdclass={"build_py": BuildBook},
    zip_safe=False,
)
