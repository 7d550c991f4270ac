"use strict";
const words = {
  en: {
    title: "Search images", search: "Search", image: "Choose or drop an image", gallery: "Gallery", source: "Source",
    all: "all sources", count: "Results", least: "Lowest score", text: "Chinese text", yours: "your image",
    like: "More like this", liked: "images like this one", share: "Copy link", shared: "Link copied",
    busy: "searching …", found: (n) => `${n} ${n === 1 ? "image" : "images"}, nearest first`, none: "nothing found",
    empty: "type a text or give an image", large: (mib) => `the image has more than ${mib} MiB`,
    lost: "the server does not answer", missing: "no image",
    about: (model, rows) => `${model} · ${rows.toLocaleString("en")} images`,
    keys: "Keys: / for the text, arrows from result to result, Enter for more like it",
  },
  zh: {
    title: "以文搜图", search: "搜索", image: "选择或拖入图片", gallery: "图库", source: "来源",
    all: "全部来源", count: "结果数", least: "最低分数", text: "中文文本", yours: "您的图片",
    like: "相似图片", liked: "与此图相似的图片", share: "复制链接", shared: "链接已复制",
    busy: "正在搜索……", found: (n) => `${n} 张图片，由近到远`, none: "没有找到图片",
    empty: "请输入文本或选择图片", large: (mib) => `图片超过 ${mib} MiB`,
    lost: "服务器没有应答", missing: "无图片",
    about: (model, rows) => `${model} · 共 ${rows.toLocaleString("en")} 张图片`,
    keys: "快捷键：/ 输入文本，方向键在结果间移动，回车查找相似图片",
  },
};
// The server's messages in Chinese; others are shown unchanged.
const chinese = [
  [/^unsupported image/, "不支持的图片"], [/^at most (\d+) characters/, "最多 $1 个字符"],
  [/^too many connections.*/, "连接过多，请稍后再试"], [/^the search failed/, "搜索失败"],
  [/^the gallery has no such source/, "图库没有这个来源"],
  [/^the gallery is damaged.*/, "图库已损坏，详情见服务器终端"],
  [/only the first (\d+) word pieces were used/, "仅使用了前 $1 个词片"],
  [/only the nearest ([\d,]+) images were looked at for this source/, "仅在最近的 $1 张图片中查找该来源"],
];
const key = "cnclip-language";
const at = (id) => document.getElementById(id);
let language = "en";
let about = { galleries: [], max_upload_bytes: Infinity };
let picture = null;   // the file that is searched for, or null
let like = null;      // the row of the gallery that is searched for, or null
let asked = 0;        // number of the newest search: answers to earlier ones are dropped
let last = null;      // the answer that is shown

function remembered() {
  try {
    return localStorage.getItem(key);
  } catch {
    return null;
  }
}

function speak(name) {
  language = name;
  const say = words[language];
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  document.title = say.title;
  for (const node of document.querySelectorAll("[data-say]")) node.textContent = say[node.dataset.say];
  for (const button of document.querySelectorAll("[data-language]")) {
    button.setAttribute("aria-pressed", String(button.dataset.language === language));
  }
  at("text").setAttribute("aria-label", say.text);
  at("preview").alt = say.yours;
  at("share").textContent = say.share;
  at("keys").textContent = say.keys;
  if (at("source").options.length) at("source").options[0].textContent = say.all;
  describeGallery();
  describeQuery();
  if (last) show(last);
}

function inWords(text) {
  if (language !== "zh") return text;
  return chinese.reduce((said, [pattern, other]) => said.replace(pattern, other), text);
}

// Everything from the server is put in as text: captions come from the web.
function add(parent, tag, name, text) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

function status(text, wrong = false) {
  at("status").textContent = text;
  at("status").classList.toggle("wrong", wrong);
}

const chosen = () => about.galleries[Number(at("gallery").value)];

function describeGallery() {
  const gallery = chosen();
  at("about").textContent = gallery ? words[language].about(about.model, gallery.rows) : "";
}

function describeQuery() {
  at("queried").textContent = like === null ? words[language].yours : words[language].liked;
  at("query").hidden = picture === null && like === null;
}

// Fill the filter with the gallery's sources; a gallery of one source has none.
function listSources(selected = "") {
  const sources = chosen()?.sources || [];
  at("source").replaceChildren();
  add(at("source"), "option", "", words[language].all).value = "";
  for (const item of sources) {
    add(at("source"), "option", "", `${item.name} (${item.rows.toLocaleString("en")})`).value = item.name;
  }
  if (selected && !sources.some((item) => item.name === selected)) {
    add(at("source"), "option", "", selected).value = selected;  // one of the many that are not listed
  }
  at("source").value = selected;
  at("filter").hidden = sources.length === 0;
}

const imageOf = (row) => `/picture?gallery=${Number(at("gallery").value)}&row=${row}`;

function card(result, rank) {
  const item = document.createElement("li");
  const image = add(item, "img");
  image.loading = "lazy";
  image.alt = result.captions.length ? result.captions[0] : words[language].missing;
  image.src = imageOf(result.row);
  const facts = add(item, "div", "facts");
  const score = add(facts, "div", "score");
  add(score, "b", "", result.score.toFixed(3));
  add(score, "span", "", `#${rank}`);
  for (const caption of result.captions) {
    const line = add(facts, "p", "caption", caption);
    line.dir = "auto";
    line.title = caption;
  }
  const source = add(facts, "p", "source", result.source);
  source.dir = "auto";
  if (/^https?:\/\//i.test(result.url)) {
    source.append(" ");
    const link = add(source, "a", "", result.url);
    link.href = result.url;
    link.rel = "noopener noreferrer";
    link.target = "_blank";
  } else if (result.url) {
    source.append(" " + result.url);
  }
  const more = add(facts, "button", "plain like", words[language].like);
  more.type = "button";
  more.addEventListener("click", () => { useRow(result.row); go(); window.scrollTo(0, 0); });
  return item;
}

function show(body) {
  last = body;
  const say = words[language];
  const results = body.results || [];
  at("results").replaceChildren(...results.map((result, place) => card(result, place + 1)));
  if (body.error) status(inWords(body.error), true);
  else status([results.length ? say.found(results.length) : say.none, inWords(body.note || "")].filter(Boolean).join(" · "));
  at("share").textContent = say.share;
  at("share").hidden = picture !== null || Boolean(body.error);  // a link cannot hold an uploaded image
}

function clear(text, wrong = false) {
  ++asked;
  last = null;
  at("results").replaceChildren();
  at("share").hidden = true;
  status(text, wrong);
}

async function search() {
  const text = at("text").value.trim();
  if (!picture && like === null && !text) {
    clear(words[language].empty);
    return;
  }
  const number = ++asked;
  const query = new URLSearchParams({ gallery: at("gallery").value || "0", k: at("k").value || "24", min_score: at("least").value || "-1" });
  if (at("source").value) query.set("source", at("source").value);
  if (like !== null) query.set("row", like);
  else if (!picture) query.set("q", text);
  status(words[language].busy);
  let body;
  try {
    const answer = await fetch(`/api/search?${query}`, picture ? { method: "POST", body: picture } : {});
    body = await answer.json();
  } catch {
    body = { error: words[language].lost };
  }
  if (number === asked) show(body);
}

function useImage(file) {
  if (file.size > about.max_upload_bytes) {
    clear(words[language].large(about.max_upload_bytes >> 20), true);
    return;
  }
  picture = file;
  like = null;
  at("text").value = "";
  URL.revokeObjectURL(at("preview").src);
  at("preview").src = URL.createObjectURL(file);
  describeQuery();
  search();
}

function useText() {
  picture = like = null;
  at("file").value = "";
  describeQuery();
}

function useRow(row) {
  picture = null;
  like = row;
  at("file").value = at("text").value = "";
  at("preview").src = imageOf(row);
  describeQuery();
}

// What is searched for is in the address, so that a search can be kept, sent and gone back to.
function fromAddress() {
  const fields = new URLSearchParams(location.hash.slice(1));
  const gallery = about.galleries.findIndex((item) => item.name === fields.get("gallery"));
  at("gallery").value = String(Math.max(gallery, 0));
  at("k").value = fields.get("k") || "24";
  at("least").value = fields.get("least") || "-1";
  listSources(fields.get("source") || "");
  describeGallery();
  const row = fields.get("like");
  if (/^\d{1,12}$/.test(row || "")) {
    useRow(Number(row));
    search();
  } else if (fields.get("q")) {
    useText();
    at("text").value = fields.get("q");
    search();
  }
}

function toAddress() {
  const fields = new URLSearchParams(like === null ? { q: at("text").value.trim() } : { like });
  if (about.galleries.length > 1) fields.set("gallery", chosen().name);
  if (at("source").value) fields.set("source", at("source").value);
  if (at("k").value !== "24") fields.set("k", at("k").value);
  if (at("least").value !== "-1") fields.set("least", at("least").value);
  const before = location.hash;
  location.hash = fields.toString();
  return location.hash !== before;  // a change is followed by `hashchange`
}

// Search for what the form says. An own image cannot be in the address.
function go() {
  if (picture || (like === null && !at("text").value.trim()) || !toAddress()) search();
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (at("text").value.trim()) useText();
  go();
});
at("text").addEventListener("keydown", (event) => {
  if (event.key === "Escape") at("text").value = "";
});
at("file").addEventListener("change", () => { if (at("file").files.length) useImage(at("file").files[0]); });
at("gallery").addEventListener("change", () => {
  if (like !== null) useText();  // its rows are others
  listSources();
  describeGallery();
  go();
});
for (const id of ["source", "k", "least"]) at(id).addEventListener("change", go);
window.addEventListener("hashchange", fromAddress);
for (const kind of ["dragover", "drop", "dragleave"]) {
  window.addEventListener(kind, (event) => {
    event.preventDefault();
    at("form").classList.toggle("over", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files.length) useImage(event.dataTransfer.files[0]);
  });
}

at("share").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(location.href);
    at("share").textContent = words[language].shared;
  } catch {
    window.prompt(words[language].share, location.href);  // without a secure connection there is no clipboard
  }
});

// Keys: "/" goes to the text, arrows go from one result's button to the next, by the columns that are shown.
document.addEventListener("keydown", (event) => {
  const here = document.activeElement;
  if (event.key === "/" && !/^(INPUT|SELECT)$/.test(here.tagName)) {
    event.preventDefault();
    at("text").focus();
    return;
  }
  const buttons = [...document.querySelectorAll("#results .like")];
  const place = buttons.indexOf(here);
  if (event.key === "ArrowDown" && here === at("text") && buttons.length) {
    event.preventDefault();
    buttons[0].focus();
  }
  if (place < 0) return;
  const cards = buttons.map((button) => button.closest("li"));
  const columns = cards.filter((item) => item.offsetTop === cards[0].offsetTop).length;
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
  if (step === undefined) return;
  event.preventDefault();
  if (place + step < 0) at("text").focus();
  else buttons[Math.min(place + step, buttons.length - 1)].focus();
});

for (const button of document.querySelectorAll("[data-language]")) {
  button.addEventListener("click", () => {
    speak(button.dataset.language);
    try {
      localStorage.setItem(key, language);
    } catch {
      // shown all the same, until the page is closed
    }
  });
}

speak(Object.hasOwn(words, remembered()) ? remembered() : navigator.language.startsWith("zh") ? "zh" : "en");
fetch("/api/about").then((answer) => answer.json()).then((facts) => {
  about = facts;
  about.galleries.forEach((gallery, number) => { add(at("gallery"), "option", "", gallery.name).value = String(number); });
  at("choose").hidden = about.galleries.length < 2;
  fromAddress();
}).catch(() => status(words[language].lost, true));
