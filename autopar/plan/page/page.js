"use strict";
(function () {
  const root = document.documentElement;

  // Light or dark: the system's choice until the reader makes one.
  document.getElementById("theme").addEventListener("click", function () {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });

  // Find nodes and parameters; folded runs open while something is looked for.
  document.querySelectorAll("input[data-filter]").forEach(function (input) {
    const part = document.getElementById(input.dataset.filter);
    const rows = Array.from(part.querySelectorAll(".node, tbody tr"));
    const texts = rows.map((row) => row.textContent.toLowerCase());
    const runs = Array.from(part.querySelectorAll("details.run"));
    input.addEventListener("input", function () {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      rows.forEach((row, i) => { row.hidden = !words.every((word) => texts[i].includes(word)); });
      runs.forEach((run) => {
        run.open = words.length > 0;
        run.hidden = words.length > 0 && !run.querySelector(".node:not([hidden])");
      });
    });
  });

  document.querySelectorAll("button[data-fold]").forEach(function (button) {
    button.addEventListener("click", function () {
      const all = Array.from(document.getElementById(button.dataset.fold).querySelectorAll("details.graph"));
      const open = !all.some((one) => one.open);
      all.forEach((one) => { one.open = open; });
      button.textContent = open ? "fold all" : "unfold all";
    });
  });

  // What a box of the timeline is.
  const picture = document.querySelector("svg.pipeline");
  const tip = document.getElementById("tip");
  if (picture) {
    const seconds = JSON.parse(document.getElementById("stage-seconds").textContent);
    const names = { f: "forward", b: "backward", w: "gradients of weights" };
    picture.addEventListener("mousemove", function (event) {
      const box = event.target.closest("rect[data-m]");
      tip.hidden = !box;
      if (!box) return;
      const kind = box.classList[0];
      const took = seconds[box.dataset.s][kind === "f" ? 0 : 1];
      tip.textContent = names[kind] + " of micro-batch " + box.dataset.m + " · stage " + box.dataset.s + " · " + took;
      tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
      tip.style.top = event.clientY + 16 + "px";
    });
    picture.addEventListener("mouseleave", function () { tip.hidden = true; });
  }
  tip.hidden = true;
  root.dataset.ready = "true";
})();
