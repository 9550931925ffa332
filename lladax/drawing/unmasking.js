for (const box of document.querySelectorAll(".lladax:not([data-live]) section")) {
  const $ = (css) => box.querySelector(css), slider = $("input"), button = $("button");
  const heat = $(".heat");
  if (heat) {
    heat.onmouseover = (e) => {
      if (e.target.matches("rect:has(title)")) $("output").textContent = e.target.textContent;
    };
  }
  if (!slider) continue;
  const text = $(".text"), plot = $("svg"), out = $("output"), steps = +slider.max;
  // Tokens and dots carry their step alike: one loop replays both.
  const timed = box.querySelectorAll("[data-s]");
  let timer = 0, on = null;
  const draw = () => {
    for (const t of timed) t.classList.toggle("m", +t.dataset.s > +slider.value);
    out.textContent = `step ${slider.value} of ${steps}`;
  };
  const stop = () => {
    cancelAnimationFrame(timer);
    timer = 0;
    button.textContent = "▶";
  };
  const point = (i) => { // marks a token and its dot, whichever of the two is pointed at
    on?.classList.remove("on");
    on = text.children[i];
    on?.classList.add("on");
    $(".at").setAttribute("d", on ? `M${i + .5} 0V${steps + 1}` : "");
    if (on) out.textContent = `position ${i + 1} · ${on.title}`;
    else draw();
  };
  button.onclick = () => {
    if (timer) return stop();
    const from = +slider.value % steps, start = performance.now();
    const pace = Math.min(150, 8000 / steps); // milliseconds a step; 8 s at the most
    const tick = (now) => {
      slider.value = Math.min(steps, from + Math.max(0, now - start) / pace);
      draw();
      if (+slider.value < steps) timer = requestAnimationFrame(tick);
      else stop();
    };
    timer = requestAnimationFrame(tick);
    button.textContent = "❚❚";
  };
  slider.oninput = () => {
    stop();
    draw();
  };
  text.onmouseover = (e) => point([...text.children].indexOf(e.target));
  plot.onmousemove = (e) => {
    const r = plot.getBoundingClientRect();
    point(Math.floor((e.clientX - r.left) / r.width * text.children.length));
  };
  text.onmouseleave = plot.onmouseleave = () => point(-1);
  $(".play").hidden = false;
  draw();
}
// Marks what an earlier script has woken already: a notebook's page has one in every cell.
for (const box of document.querySelectorAll(".lladax")) box.dataset.live = "";
