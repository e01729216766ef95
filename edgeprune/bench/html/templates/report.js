(() => {
  "use strict";
  const root = document.documentElement;
  root.classList.add("scripted");

  const button = document.getElementById("theme");
  const themes = { auto: ["◐", "as the system has them"], light: ["☀", "of the day"], dark: ["☾", "of the night"] };
  const key = "edgeprune-report-theme";
  const take = (theme) => {
    if (theme === "auto") root.removeAttribute("data-theme");
    else root.setAttribute("data-theme", theme);
    const [sign, words] = themes[theme];
    button.firstElementChild.textContent = `${sign} `;
    button.querySelector("[data-name]").textContent = theme;
    button.setAttribute("aria-label", `${theme}: colours ${words}`);
    button.dataset.now = theme;
  };
  const remember = (action) => {
    try { return action(window.localStorage); } catch (error) { return null; } // refused for files by some browsers
  };
  const before = remember((store) => store.getItem(key));
  take(before in themes ? before : "auto");
  button.addEventListener("click", () => {
    const names = Object.keys(themes);
    const next = names[(names.indexOf(button.dataset.now) + 1) % names.length];
    take(next);
    remember((store) => store.setItem(key, next));
  });

  for (const overlay of document.querySelectorAll("[data-overlay]")) {
    const stages = JSON.parse(overlay.dataset.stages);
    const densities = JSON.parse(overlay.dataset.densities);
    const stageSlider = overlay.querySelector("[data-stage-slider]");
    const densitySlider = overlay.querySelector("[data-density-slider]");
    const play = overlay.querySelector("[data-play]");
    const pictures = [...overlay.querySelectorAll("[data-picture]")].map((figure) => ({
      figure,
      keeps: JSON.parse(figure.dataset.keeps),
      patches: Number(figure.dataset.patches),
    }));
    const show = () => {
      const stage = Number(stageSlider.value);
      const density = densitySlider ? Number(densitySlider.value) : 0;
      const stageWords = stage === 0 ? "before any stage" : `${stage} of ${stages.length}: ${stages[stage - 1]}`;
      stageSlider.setAttribute("aria-valuetext", stageWords);
      overlay.querySelector("[data-stage-told]").textContent = stageWords;
      if (densitySlider) {
        densitySlider.setAttribute("aria-valuetext", densities[density]);
        overlay.querySelector("[data-density-told]").textContent = densities[density];
      }
      for (const { figure, keeps, patches } of pictures) {
        for (const group of figure.querySelectorAll("[data-density]")) {
          const shown = Number(group.dataset.density) === density;
          group.setAttribute("display", shown ? "inline" : "none");
          for (const path of group.querySelectorAll("[data-stage]")) {
            path.setAttribute("display", Number(path.dataset.stage) <= stage ? "inline" : "none");
          }
        }
        const keep = keeps[density];
        const left = [patches, ...keep.kept][Math.min(stage, keep.kept.length)];
        const right = keep.right === null ? "" : keep.right ? " ✓ right" : " ✗ wrong";
        figure.querySelector("[data-told]").textContent = `says ${keep.told}${right}`;
        const share = Math.round((100 * left) / patches);
        const over = keep.overflow ? ", more wanted than there are slots" : "";
        figure.querySelector("[data-left]").textContent = `${left} of ${patches} patches (${share} %)${over}`;
      }
    };
    let timer = 0;
    const stop = () => {
      window.clearInterval(timer);
      timer = 0;
      play.textContent = "▶ Play";
      play.setAttribute("aria-pressed", "false");
    };
    for (const slider of [stageSlider, densitySlider]) {
      if (slider) slider.addEventListener("input", () => { stop(); show(); });
    }
    play.addEventListener("click", () => {
      if (timer) { stop(); return; }
      play.textContent = "■ Stop";
      play.setAttribute("aria-pressed", "true");
      const step = () => {
        stageSlider.value = String((Number(stageSlider.value) + 1) % (stages.length + 1));
        show();
      };
      step();
      timer = window.setInterval(step, 900);
    });
    show();
  }
})();
