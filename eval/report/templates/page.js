"use strict";
// The language of the page: both are in it, and the attribute `lang` says which one is shown.
const key = "cnclip-language";
const root = document.documentElement;

// The stage's own page must not hold the run's name, or equal runs would differ: its address says it.
function nameOfRun() {
  const place = /\/([^/]+)\/report\/report\.html$/.exec(location.pathname);
  if (!place || !("unnamed" in root.dataset)) return null;
  try {
    return decodeURIComponent(place[1]);
  } catch {
    return place[1];
  }
}

function show(language) {
  const name = nameOfRun();
  const heading = document.querySelector("h1");
  if (name && heading) heading.textContent = name;
  root.lang = language === "zh" ? "zh-CN" : "en";
  document.title = name ?? root.dataset[language === "zh" ? "titleZh" : "titleEn"];
  for (const button of document.querySelectorAll("[data-language]")) {
    button.setAttribute("aria-pressed", String(button.dataset.language === language));
  }
}

function remembered() {
  try {
    return localStorage.getItem(key);
  } catch {
    return null;  // a browser that keeps nothing for files
  }
}

const known = remembered();
const first = known === "zh" || known === "en" ? known : navigator.language.startsWith("zh") ? "zh" : "en";
show(first);
document.addEventListener("DOMContentLoaded", () => show(first));
document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-language]");
  if (!button) return;
  show(button.dataset.language);
  try {
    localStorage.setItem(key, button.dataset.language);
  } catch {
    // shown all the same, until the page is closed
  }
});
