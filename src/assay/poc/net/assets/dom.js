// Elements by their ids, and text that goes in as text: nothing that a stranger wrote is ever read as HTML.

const $ = (id) => document.getElementById(id);

function put(id, text) {
  const node = $(id);
  if (node.textContent !== text) node.textContent = text;
}

function showSentence(kind, words) {
  $("sentence").className = `subtitle ${kind}`;
  put("sentence", words);
}

/** A stranger's text, isolated so that its writing direction stays its own; whole in the tooltip. */
function name(text, most) {
  const node = document.createElement("bdi");
  node.textContent = shorten(text, most);
  if (node.textContent !== text) node.title = visible(text);
  return node;
}

function putName(id, text, most) {
  const fresh = name(text, most);
  if ($(id).firstChild?.textContent !== fresh.textContent) $(id).replaceChildren(fresh);
}

function cell(className, ...children) {
  const node = document.createElement("td");
  node.className = className;
  node.append(...children);
  return node;
}

function part(className, ...children) {
  const node = document.createElement("span");
  node.className = className;
  node.append(...children);
  return node;
}

/** The badge of a verdict on a node. */
function badge(verdict) {
  const [kind, mark] = VERDICTS[verdict] ?? ["undecided", "·"];
  return part(`badge ${kind}`, part("mark", mark), visible(verdict));
}
