-- Links between sources become links between pages; Quarto's callouts become boxes.
function Link(el)
  if not el.target:match("^%a[%w+.-]*:") then
    el.target = el.target:gsub("%.ipynb$", ".html"):gsub("%.ipynb#", ".html#"):gsub("%.md$", ".html"):gsub("%.md#", ".html#")
  end
  return el
end

function Div(el)
  local kind
  for _, class in ipairs(el.classes) do kind = kind or class:match("^callout%-(%a+)$") end
  if not kind then return nil end
  local title = { pandoc.Str(el.attributes.title or kind:gsub("^%l", string.upper)) }
  if el.content[1] and el.content[1].t == "Header" then title = el.content[1].content; el.content:remove(1) end
  if el.attributes.collapse then
    local open = el.attributes.collapse == "false" and " open" or ""
    local blocks = pandoc.List({ pandoc.RawBlock("html", '<details class="callout ' .. kind .. '"' .. open .. "><summary>"), pandoc.Plain(title), pandoc.RawBlock("html", "</summary>") })
    blocks:extend(el.content)
    blocks:insert(pandoc.RawBlock("html", "</details>"))
    return blocks
  end
  el.content:insert(1, pandoc.Para(pandoc.Strong(title)))
  return pandoc.Div(el.content, pandoc.Attr("", { "callout", kind }))
end
