// The server's page: a conversation (or a text that goes on), and texts whose [MASK]s are filled in.
// A reply's life: `ask` posts what is wanted, `chunks` reads the stream, `Reply.take` keeps of each place all that ever
// stood there, and `Reply.draw` shows any pass of it. What a model writes is text: nothing here makes markup of it.
const $ = (css, box = document) => box.querySelector(css);
const make = (name) => $(`#${name}`).content.firstElementChild.cloneNode(true);
const element = (name, textContent) => Object.assign(document.createElement(name), { textContent });
const calm = matchMedia("(prefers-reduced-motion: reduce)");

/** What went wrong, in a line; the field that it is about; seconds until there is sense in another try. */
class Fault extends Error {
  constructor(message, param, wait) {
    super(message);
    Object.assign(this, { param, wait });
  }
}

// ---- the text of tokens

const END = "⏎", LOST = "▒"; // what ends a text; what an edit replaced before anybody saw it
const BYTES = /^(?:⟨[0-9A-F]{2}⟩)+$/;
const utf8 = new TextDecoder("utf-8", { fatal: true });

/** Controls, and marks that turn the order of text around, as escapes: shown, not obeyed. */
const visible = (text) =>
  // deno-lint-ignore no-control-regex
  text.replace(/[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/g, (x) =>
    x < " " ? String.fromCharCode(0x2400 + x.charCodeAt()) : `\\u${x.charCodeAt().toString(16).padStart(4, "0")}`);

/** [first, last, text] of places whose bytes are whole characters together; `pieces` holds undefined where masked. */
function* characters(pieces) {
  for (let i = 0; i < pieces.length; i++) {
    const bytes = [];
    for (let j = i; j < i + 8 && BYTES.test(pieces[j] ?? ""); j++) {
      bytes.push(...pieces[j].match(/[0-9A-F]{2}/g).map((x) => parseInt(x, 16)));
      try {
        yield [i, j, utf8.decode(new Uint8Array(bytes))];
        i = j;
        break;
      } catch { /* a part of a character is still missing */ }
    }
  }
}

// ---- a reply: its canvas at every pass

class Reply {
  places = []; // of each: {pass, piece, p} of what stood there, first to last
  items = []; // the element of each place
  passes = 0;
  tokens = 0;
  written = ""; // the text that will not change any more
  began = performance.now();

  constructor(log, prompt = "") {
    this.box = make("reply");
    for (const name of ["text", "tip", "order", "play", "at", "facts", "error"]) this[name] = $("." + name, this.box);
    this.slider = $("input", this.box);
    if (prompt) this.text.append(element("b", visible(prompt)));
    this.play.onclick = () => this.timer ? this.pause() : this.replay();
    this.slider.oninput = () => {
      this.pause();
      this.draw();
    };
    const over = (e) => this.point(this.items.indexOf(e.target.closest("i")));
    this.text.onpointerover = this.text.onclick = over;
    this.text.onpointerleave = (e) => e.pointerType === "mouse" && this.point(-1);
    this.text.onblur = () => this.point(-1);
    this.text.onkeydown = (e) => this.walk(e);
    this.box.classList.add("running");
    this.text.ariaBusy = "true";
    log.append(this.box);
  }

  take({ pass, pieces, unmasked_at, edited_at, confidence }) {
    const follows = +this.slider.value === this.passes;
    this.passes = Math.max(this.passes, pass);
    for (const [i, piece] of pieces.entries()) {
      const place = this.places[i] ??= [], before = place.at(-1);
      if (piece === null) continue;
      const at = Math.max(unmasked_at[i], edited_at?.[i] ?? 0), now = { pass: at, piece, p: confidence[i] };
      if (!before && at > unmasked_at[i]) place.push({ pass: unmasked_at[i], piece: LOST });
      if (!before || at > before.pass) place.push(now);
      if (!before && at) this.first ??= performance.now();
    }
    this.tokens = this.places.filter((x) => x[0]?.pass > 0).length;
    this.slider.max = this.passes;
    if (follows && !this.timer) this.slider.value = this.passes;
    this.frame ||= requestAnimationFrame(() => this.show());
  }

  /** Draws what is new, at most once a frame. */
  show() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    const low = document.documentElement, near = low.scrollHeight - low.scrollTop - innerHeight < 120;
    this.plot();
    this.draw();
    this.tell();
    if (near && this.box.classList.contains("running")) low.scrollTop = low.scrollHeight;
  }

  /** The canvas behind the pass where the slider stands. */
  draw() {
    const k = +this.slider.value, n = this.places.length, last = this.ended && k === this.passes;
    const now = this.places.map((place) => place.findLast((x) => x.pass <= k));
    const pieces = now.map((x) => x?.piece), shown = pieces.map((x) => x && visible(x)), hidden = new Set();
    for (const [i, j, text] of characters(pieces)) {
      shown[i] = visible(text);
      now[i] = now.slice(i, j + 1).reduce((x, y) => y.pass > x.pass ? y : x);
      for (let x = i + 1; x <= j; x++) hidden.add(x);
    }
    let end = n; // the end of a text, and what is left masked behind it, are one sign
    while (end && (pieces[end - 1] === END || (last && !now[end - 1]))) end--;
    for (let x = end + 1; x < n; x++) hidden.add(x);
    while (this.items.length < n) this.items.push(this.text.appendChild(element("i", "")));
    this.text.style.setProperty("--n", Math.max(1, this.passes - 1));
    for (const [i, item] of this.items.entries()) {
      const it = now[i], place = this.places[i], pass = it?.pass ?? 0;
      // What is masked now is as wide as what will stand there.
      const text = it ? shown[i] : (place.at(-1)?.piece ?? "░").replace(/\S/gu, "░").replace(/^\s*$/, "$&░");
      const edited = it && place[1]?.pass <= k, just = pass && pass === k && !last;
      const is = { m: !it, given: it && !pass, just, edited, end: it?.piece === END, n: it && text.includes("\n") };
      const names = Object.keys(is).filter((x) => is[x]).join(" ");
      const times = i === end && n - end > 1 ? `×${n - end}` : "";
      const drawn = [text, names, pass, times, hidden.has(i)].join("|");
      if (item.drawn === drawn) continue;
      Object.assign(item, { drawn, textContent: text, className: names, hidden: hidden.has(i) });
      item.dataset.times = times;
      item.style.setProperty("--t", Math.max(0, pass - 1));
    }
    for (const path of this.order.children) path.classList.toggle("m", +path.dataset.pass > k);
    const left = now.filter((x) => !x).length;
    this.at.textContent = `pass ${k} of ${this.passes}` + (left ? ` · ${left} masked` : "");
    this.slider.ariaValueText = this.at.textContent;
    if (this.on !== undefined) this.point(this.on);
  }

  /** Order against position: a dot for each token, time upwards. */
  plot() {
    const dots = new Map();
    for (const [i, place] of this.places.entries()) {
      for (const { pass } of place) {
        if (pass) dots.set(pass, (dots.get(pass) ?? "") + `M${i}.5 ${this.passes - pass + .5}h.01`);
      }
    }
    this.order.setAttribute("viewBox", `0 0 ${this.places.length || 1} ${this.passes || 1}`);
    this.order.style.setProperty("--n", Math.max(1, this.passes - 1));
    this.order.replaceChildren(...[...dots].map(([pass, d]) => {
      const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
      path.setAttribute("d", d);
      path.dataset.pass = pass;
      path.style.setProperty("--t", pass - 1);
      return path;
    }));
  }

  /** Numbers: of what is there so far, or, at the end, as the server counts them. */
  tell() {
    const seconds = ((this.ended ?? performance.now()) - this.began) / 1000;
    const tokens = this.usage?.completion_tokens ?? this.tokens, passes = this.usage?.passes ?? this.passes;
    const facts = [`${tokens} tokens`, `${passes} passes`];
    if (passes) facts.push(`${(tokens / passes).toFixed(1)} tokens/pass`);
    facts.push(`${(tokens / seconds).toFixed(tokens < 10 * seconds ? 1 : 0)} tokens/s`);
    facts.push(`${seconds.toFixed(seconds < 10 ? 2 : 0)} s`);
    if (this.first) facts.push(`first token after ${((this.first - this.began) / 1000).toFixed(2)} s`);
    if (this.seed !== undefined) facts.push(`seed ${this.seed}`);
    this.facts.replaceChildren(...facts.map((text) => element("span", text)));
  }

  end() {
    this.ended = performance.now();
    this.box.classList.remove("running");
    this.text.ariaBusy = "false";
    this.show();
  }

  fail(message) {
    this.error.textContent = message;
    this.error.hidden = false;
  }

  pause() {
    cancelAnimationFrame(this.timer);
    this.timer = 0;
    this.play.textContent = "▶";
    this.play.ariaLabel = "Replay";
  }

  replay() {
    const from = +this.slider.value % (this.passes || 1), start = performance.now();
    const pace = Math.min(150, 8000 / this.passes); // milliseconds a pass; 8 s at the most
    const tick = (now) => {
      this.slider.value = Math.min(this.passes, from + Math.max(0, now - start) / pace);
      this.draw();
      if (+this.slider.value < this.passes) this.timer = requestAnimationFrame(tick);
      else this.pause();
    };
    this.timer = requestAnimationFrame(tick);
    this.play.textContent = "❚❚";
    this.play.ariaLabel = "Pause";
  }

  /** Tells of one place, beside it: pointed at, tapped, or reached by the arrow keys; -1: of none. */
  point(i) {
    this.items[this.on]?.classList.remove("on");
    this.on = i < 0 ? undefined : i;
    const item = this.items[i], place = this.places[i];
    this.tip.hidden = !item;
    if (!item) return;
    item.classList.add("on");
    const k = +this.slider.value, was = place.filter((x) => x.pass <= k);
    this.tip.textContent = was.map(({ pass, p }, n) => {
      const sure = p === undefined ? "" : ` · ${(100 * p).toFixed(1)}%`;
      if (n) return `edited at pass ${pass}${sure} · was “${visible(was[n - 1].piece).trim()}”`;
      return pass ? `pass ${pass}${sure}` : "given";
    }).join(" · ") || "masked";
    const all = this.box.getBoundingClientRect(), it = item.getClientRects()[0] ?? all;
    const left = Math.min(it.left - all.left, all.width - this.tip.offsetWidth);
    this.tip.style.left = `${Math.max(0, left)}px`;
    this.tip.style.top = `${it.top - all.top - this.tip.offsetHeight - 4}px`;
  }

  walk(e) {
    const way = { ArrowLeft: -1, ArrowRight: 1 }[e.key];
    if (e.key === "Escape") this.point(-1);
    if (!way || !this.items.length) return;
    e.preventDefault();
    let i = this.on ?? (way > 0 ? -1 : this.items.length);
    do i += way; while (this.items[i]?.hidden);
    if (this.items[i]) this.point(i);
  }
}

// ---- the server

/** The answer to a request; asks for a key where the server wants one. */
async function call(path, body, signal) {
  for (;;) {
    const key = sessionStorage.getItem("key"), headers = key ? { authorization: `Bearer ${key}` } : {};
    if (body) headers["content-type"] = "application/json";
    const how = { method: body ? "POST" : "GET", body: body && JSON.stringify(body), headers, signal };
    const answer = await fetch(path, how).catch((error) => {
      throw error.name === "AbortError" ? error : new Fault("The server cannot be reached: is it running?", null, 3);
    });
    if (answer.ok) return answer;
    const { message, param } = (await answer.json().catch(() => ({}))).error ?? {}, said = message ?? answer.statusText;
    if (answer.status === 401) {
      if (await askKey(key ? said : "")) continue;
      throw new Fault("The server wants a key: load the page again to give one.");
    }
    const wait = +answer.headers.get("retry-after");
    const again = wait && !/again/.test(said) ? `: try again in ${wait} s` : "";
    throw new Fault(`${said || `The server answers ${answer.status}`}${again}`, param, wait || 3);
  }
}

/** Whether there is a new key to try. */
function askKey(said) {
  const dialog = $("dialog"), input = $("input", dialog);
  $(".error", dialog).textContent = said;
  input.value = "";
  dialog.showModal();
  return new Promise((resolve) => {
    $("form", dialog).onsubmit = (e) => {
      e.preventDefault();
      sessionStorage.setItem("key", input.value.trim());
      dialog.onclose = null;
      dialog.close();
      resolve(true);
    };
    $(".cancel", dialog).onclick = () => dialog.close();
    dialog.onclose = () => resolve(false);
  });
}

/** The chunks of a streamed answer. */
async function* chunks(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "";;) {
    const { value, done } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Fault("The connection broke off.");
    });
    if (done) throw new Fault("The answer broke off.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      if (line.slice(5).trim() === "[DONE]") return;
      const chunk = JSON.parse(line.slice(5));
      if (chunk.error) throw new Fault(chunk.error.message, chunk.error.param);
      yield chunk;
    }
  }
}

// ---- the page

const form = $(".composer"), box = $("textarea"), log = (mode) => $(`#${mode.name} .log`);
const talk = { name: "talk", draft: "", said: [] }, fill = { name: "fill", draft: "", said: [] };
let mode = talk, model = null;
const BOOLEANS = ["true", "false"];
const CHOICES = { // of the settings whose values are names
  remasking: ["low_confidence", "low_margin", "high_entropy", "random", "sequential"],
  cache: ["none", "prefix", "dual"],
};

/** What was changed of the sampler's settings, as the API takes it. */
function changed() {
  const body = {};
  for (const field of form.querySelectorAll("[name]")) {
    const text = field.value.trim(), { name } = field;
    if (!text || (name === "max_tokens" && mode === fill)) continue;
    if (text === "none") body[name === "max_tokens" ? "gen_length" : name] = null;
    else body[name] = BOOLEANS.includes(text) ? text === "true" : Number.isFinite(+text) ? +text : text;
  }
  return body;
}

/** The error of the form, and the field it is about. */
function complain(message = "", param = null) {
  const error = $(".error", form);
  error.textContent = message;
  error.hidden = !message;
  for (const field of form.querySelectorAll("[name]")) {
    const bad = field.name === param || (param === "gen_length" && field.name === "max_tokens");
    field.ariaInvalid = String(bad);
    if (bad) {
      error.textContent = message.includes(param) ? message : `${param}: ${message}`;
      unfold(true);
      field.focus();
    }
  }
}

/** Asks the server for what `text` wants, in this mode, and shows the reply as it comes. */
async function ask(mode, text) {
  const chat = mode === talk && model.lladax.chats, goesOn = mode === talk && !chat;
  const message = { role: "user", content: text }, prompt = goesOn ? mode.said.join("") + text : text;
  const asked = chat && log(mode).appendChild(make("asked"));
  if (asked) asked.textContent = visible(text);
  const reply = new Reply(log(mode), goesOn ? text : ""), run = mode.run = new AbortController();
  refresh();
  document.documentElement.scrollTop = document.documentElement.scrollHeight;
  $(".told").textContent = "The model writes.";
  try {
    const answer = await call(chat ? "v1/chat/completions" : "v1/completions", {
      model: model.id,
      ...(chat ? { messages: [...mode.said, message] } : { prompt }),
      ...changed(),
      stream: true,
      stream_options: { canvas: true, include_usage: true },
    }, run.signal);
    for await (const chunk of chunks(answer)) {
      const choice = chunk.choices[0];
      reply.written += choice?.delta?.content ?? choice?.text ?? "";
      reply.usage = chunk.usage ?? reply.usage;
      reply.seed = chunk.seed ?? reply.seed;
      if (chunk.canvas) reply.take(chunk.canvas);
    }
    $(".told").textContent = reply.written;
  } catch (error) {
    if (run.signal.aborted) reply.fail("Stopped.");
    else if (reply.passes) reply.fail(error.message);
    else complain(error.message, error.param);
    if (!(error instanceof Fault) && !run.signal.aborted) console.error(error);
  }
  reply.end();
  if (mode.run !== run) return; // the conversation was left
  mode.run = null;
  if (!reply.passes) { // nothing came: what was asked goes back into the box
    if (asked) asked.remove();
    reply.box.remove();
    mode.draft ||= text;
  } else if (goesOn) mode.said = [prompt + reply.written];
  else if (chat && reply.written) mode.said.push(message, { role: "assistant", content: reply.written });
  refresh();
}

/** The page as things stand. */
function refresh() {
  const chat = model?.lladax.chats ?? true, filling = mode === fill;
  for (const { name } of [talk, fill]) {
    const here = name === mode.name, tab = $(`#tab-${name}`);
    $(`#${name}`).hidden = !here;
    tab.ariaSelected = String(here);
    tab.tabIndex = here ? 0 : -1;
  }
  const [act, wants, anew] = filling
    ? ["Fill in", "A text with [MASK]s to fill in", "Clear"]
    : chat
    ? ["Send", "Ask something", "New conversation"]
    : ["Continue", "A text to continue", "New text"];
  $("#tab-talk").textContent = chat ? "Chat" : "Continue";
  if (model) box.placeholder = box.ariaLabel = wants;
  const fresh = $(".new", form), sends = $(".send", form), empty = !log(mode).childElementCount;
  Object.assign(sends, { textContent: act, disabled: !model, hidden: !!mode.run });
  Object.assign(fresh, { textContent: anew.split(" ")[0], ariaLabel: anew, hidden: empty });
  $(".stop").hidden = !mode.run;
  $(".masks").hidden = !filling;
  $(`#${mode.name} .welcome`).hidden = !empty;
  const n = Object.keys(changed()).length;
  Object.assign($("button.sampler"), {
    textContent: n ? `Sampler · ${n}` : "Sampler",
    ariaLabel: n ? `Sampler · ${n} changed` : "Sampler",
  });
  for (const label of $(".options").children) label.hidden = filling && label.lastElementChild.name === "max_tokens";
  if (box.value !== mode.draft) box.value = mode.draft;
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + 2}px`;
}

function turn(to) {
  mode = to;
  complain();
  refresh();
  if (!calm.matches && !log(to).childElementCount) to.demo.replay();
}

function unfold(open) {
  $("#sampler").hidden = !open;
  $("button.sampler").ariaExpanded = String(open);
}

function send() {
  const text = mode.draft;
  if (mode.run || !model || (!text.trim() && (mode === fill || model.lladax.chats || !mode.said.length))) return;
  complain();
  if (mode === fill && !text.includes("[MASK]")) return complain("There is no [MASK] in the text: insert one.");
  if (mode === talk) mode.draft = "";
  unfold(false);
  ask(mode, text);
}

form.onsubmit = (e) => {
  e.preventDefault();
  send();
};
box.onkeydown = (e) => {
  if (e.key !== "Enter" || e.shiftKey || e.isComposing) return;
  e.preventDefault();
  send();
};
box.oninput = () => {
  mode.draft = box.value;
  refresh();
};
$(".stop").onclick = () => {
  mode.run?.abort();
  box.focus();
};
$(".new", form).onclick = () => {
  const run = mode.run;
  Object.assign(mode, { run: null, said: [] });
  run?.abort();
  log(mode).replaceChildren();
  turn(mode);
  box.focus();
};
$(".masks").onclick = (e) => {
  const n = +e.target.dataset.masks;
  if (!n) return;
  box.setRangeText("[MASK]".repeat(n), box.selectionStart, box.selectionEnd, "end");
  box.focus();
  box.oninput();
};
$("button.sampler").onclick = () => unfold($("#sampler").hidden);
$(".options").oninput = () => {
  complain();
  refresh();
};
$(".reset").onclick = () => {
  for (const field of form.querySelectorAll("[name]")) field.value = "";
  $(".options").oninput();
};
for (const [one, other] of [[talk, fill], [fill, talk]]) {
  const tab = $(`#tab-${one.name}`);
  tab.onclick = () => turn(one);
  tab.onkeydown = (e) => {
    if (e.key !== "ArrowLeft" && e.key !== "ArrowRight") return;
    turn(other);
    $(`#tab-${other.name}`).focus();
  };
}

/** A field for every setting that the server has, its default in it. */
function offer(defaults) {
  for (const [setting, value] of Object.entries(defaults)) {
    if (value !== null && typeof value === "object") continue;
    const name = setting === "gen_length" ? "max_tokens" : setting, label = make("option");
    const choices = typeof value === "boolean" ? BOOLEANS : CHOICES[name];
    const placeholder = name === "seed" ? "random" : String(value ?? "none");
    const field = Object.assign(element(choices ? "select" : "input", ""), { name, placeholder, inputMode: "decimal" });
    for (const x of choices ? new Set([placeholder, ...choices]) : []) {
      field.add(new Option(x, x === placeholder ? "" : x));
    }
    $("span", label).textContent = name.replaceAll("_", " ");
    label.append(field);
    $(".options").append(label);
  }
}

/** What the page is about, drawn as a reply is; pass 0 is given. */
function welcome(mode, text, unmasked_at) {
  const pieces = text.split(/(?=[ .,;:])/), confidence = [];
  const where = $(`#${mode.name} .welcome`);
  mode.demo = new Reply(where);
  where.prepend(mode.demo.box);
  mode.demo.take({ pass: Math.max(...unmasked_at), pieces, unmasked_at, confidence });
  mode.demo.end();
}

/** Waits until the server is ready, and learns what it serves. */
async function meet() {
  while (!model) {
    try {
      model = (await (await call("v1/models")).json()).data[0];
      complain();
    } catch (error) {
      complain(error.message);
      if (!error.wait) return;
      await new Promise((wake) => setTimeout(wake, 1000 * Math.min(5, error.wait)));
    }
  }
  $(".model").textContent = model.id;
  document.title = `${model.id} · lladax`;
  offer(model.lladax.sampler);
  refresh();
  box.focus();
}

welcome(
  talk,
  "Every word is masked at first; the model fills in what it is surest of, pass by pass, in any order.",
  [5, 6, 2, 4, 1, 1, 3, 2, 3, 7, 4, 8, 6, 5, 9, 7, 8, 10, 9, 10, 11, 6, 12, 11, 1],
);
welcome(
  fill,
  "What is given stays, and what lies between is filled in, with both sides in view.",
  [0, 0, 0, 0, 0, 0, 3, 5, 4, 1, 6, 2, 0, 0, 0, 0, 0, 0, 0],
);
turn(talk);
meet();
