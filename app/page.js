// What the page does by itself: shows the candidate that was picked, copies code, keeps the address up to date.
(() => {
  "use strict";
  let picked = null; // id of the candidate that the user chose; until then the winner is shown

  const card = (id) => document.getElementById("candidate-" + id);

  function show(id) {
    const panel = document.getElementById("vi-inspector");
    const source = id === null ? null : card(id);
    if (!panel || !source) return;
    const media = source.querySelector(".vi-media").cloneNode(true);
    const detail = source.querySelector(".vi-detail").cloneNode(true);
    detail.hidden = false;
    panel.replaceChildren(media, detail);
    for (const node of document.querySelectorAll("[data-candidate]")) {
      const same = node.dataset.candidate === id;
      node.setAttribute("aria-pressed", String(same));
      if (node.tagName === "a") node.setAttribute("role", "button");
    }
  }

  function refresh() {
    const winner = document.querySelector(".vi-card.vi-winner .vi-pick");
    if (picked !== null && !card(picked)) picked = null;
    show(picked ?? winner?.dataset.candidate ?? null);
  }

  function pick(id) {
    picked = id;
    show(id);
    const panel = document.getElementById("vi-inspector");
    const box = panel.getBoundingClientRect();
    if (box.top > innerHeight - 80 || box.bottom < 80) {
      const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
      panel.scrollIntoView({ block: "center", behavior: calm ? "auto" : "smooth" });
    }
  }

  // The address always names the settings on screen, so that it can be shared at any time.
  function address() {
    const query = document.querySelector("[data-query]")?.dataset.query;
    if (query === undefined) return;
    const kept = [...new URLSearchParams(location.search)].filter(([name]) => name.startsWith("__"));
    const all = new URLSearchParams(query.replace(/^\?/, ""));
    for (const [name, value] of kept) all.set(name, value);
    history.replaceState(null, "", "?" + all);
  }

  function links() {
    for (const code of document.querySelectorAll("[data-link]"))
      code.textContent = location.origin + location.pathname + "?" + code.dataset.link.replace(/^\?/, "");
  }

  async function copy(button) {
    const text = button.closest(".vi-code").querySelector("code").textContent;
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(button.closest(".vi-code").querySelector("code"));
      button.textContent = "Selected";
    }
    setTimeout(() => (button.textContent = "Copy"), 2000);
  }

  function say(text) {
    const line = document.querySelector("#vi-status [role=status]");
    if (line) line.textContent = text;
  }

  function reveal() {
    const stage = document.getElementById("vi-stage");
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    if (stage && stage.getBoundingClientRect().top > innerHeight / 2)
      stage.scrollIntoView({ block: "start", behavior: calm ? "auto" : "smooth" });
  }

  document.addEventListener("click", (event) => {
    const node = event.target.closest("[data-candidate]");
    // Said here and at once: an answer from the server could come after the last frame and stay.
    if (event.target.closest("#vi-cancel")) say("Ending with the best so far.");
    const button = event.target.closest(".vi-copy");
    if (node) {
      event.preventDefault();
      pick(node.dataset.candidate);
    } else if (button) copy(button);
  });
  document.addEventListener("keydown", (event) => {
    const node = event.target.closest?.("a[data-candidate]"); // a link answers Enter by itself, a button Space, too
    if (node && event.key === " ") {
      event.preventDefault();
      pick(node.dataset.candidate);
    }
  });

  window.visearch = { refresh, address, links, reveal };
})();
