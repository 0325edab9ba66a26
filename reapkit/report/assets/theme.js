"use strict";
// Runs before the page is painted: the reader's choice on this machine, else the system's, else light.
(() => {
  const root = document.documentElement, system = matchMedia("(prefers-color-scheme: dark)");
  const asked = /[#&]theme=(light|dark)/.exec(location.hash);
  let chosen = asked && asked[1];
  try { chosen = chosen || localStorage.getItem("reapkit-theme"); } catch { /* private window: nothing is remembered */ }
  const follow = () => { root.dataset.theme = chosen || (system.matches ? "dark" : "light"); };
  system.addEventListener("change", () => { follow(); root.dispatchEvent(new Event("themechange")); });
  root.switchTheme = () => {
    chosen = root.dataset.theme === "dark" ? "light" : "dark";
    try { localStorage.setItem("reapkit-theme", chosen); } catch { /* the choice lasts for this page */ }
    follow();
    root.dispatchEvent(new Event("themechange"));
  };
  follow();
})();
