"use strict";
// Text of questions, passages and answers is inserted as text alone: the page's policy forbids everything else.

const LONG_PASSAGE = 260; // characters; longer ones are folded
const RETRY_MS = 1000; // between two looks whether the model is loaded
const byId = (id) => document.getElementById(id);
let settings = null; // of the server
let cards = []; // of the questions that are shown


function make(tag, name, text) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== undefined) element.textContent = text;
  return element;
}

// ---- the server

async function request(path, options = {}) {
  const token = sessionStorage.getItem("token");
  const headers = { ...(token && { Authorization: `Bearer ${token}` }), ...(options.body && { "Content-Type": "application/json" }) };
  const reply = await fetch(path, { ...options, headers });
  if (reply.ok) return reply;
  const detail = await reply.json().then((body) => body.detail, () => reply.statusText);
  if (reply.status === 401) byId("token-row").hidden = false;
  throw Object.assign(new Error(detail), { status: reply.status });
}

async function* lines(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const line of parts) if (line) yield JSON.parse(line);
  }
}

// ---- one answer

class Card {
  constructor(policy, title) {
    this.policy = policy;
    this.abort = new AbortController();
    this.result = null;
    this.isOver = false;
    this.root = make("article", "answer-card");
    const header = make("header");
    this.status = make("p", "status", "waiting");
    this.status.setAttribute("role", "status");
    header.append(make("h2", "", title), this.status);
    this.facts = make("p", "facts");
    this.steps = make("ol", "steps");
    this.pause = make("div", "pause");
    this.pause.hidden = true;
    this.next = make("button", "primary", "Next step");
    const rest = make("button", "", "To the end");
    this.next.type = rest.type = "button";
    this.next.addEventListener("click", () => this.goOn(true));
    rest.addEventListener("click", () => this.goOn(false));
    this.pause.append(this.next, rest);
    this.root.append(header, this.facts, this.steps, this.pause);
  }

  say(text, isWarning = false) {
    this.status.textContent = text;
    this.status.classList.toggle("warning", isWarning);
  }

  async play(body) {
    try {
      const reply = await request("/v1/ask", { method: "POST", body: JSON.stringify(body), signal: this.abort.signal });
      for await (const row of lines(reply)) this.hear(row);
      if (!this.isOver) this.end("the connection has ended", true);
    } catch (error) {
      if (error.name === "AbortError") this.end("stopped");
      else this.end(error.message, true);
    }
  }

  end(text, isWarning = false) {
    this.isOver = true;
    this.pause.hidden = true;
    this.settle();
    this.say(text, isWarning);
    update();
  }

  stop() {
    if (!this.isOver) this.abort.abort();
  }

  async goOn(single) {
    if (this.pause.hidden) return;
    this.pause.hidden = true;
    const body = JSON.stringify({ single_steps: single });
    try {
      await request(`/v1/questions/${this.id}/next`, { method: "POST", body });
    } catch (error) {
      this.say(error.message, true);
    }
  }

  hear(row) {
    switch (row.event) {
      case "asked": this.id = row.id; this.golds = row.golden_answers; break;
      case "waiting": this.say(row.num_ahead ? `waiting, ${row.num_ahead} before this one` : "waiting, next in turn"); break;
      case "started": this.say("reading"); break;
      case "text": this.write(row); break;
      case "step": this.showStep(row); break;
      case "search": this.say("searching"); break;
      case "passages": this.showPassages(row); break;
      case "paused": this.say("paused"); this.pause.hidden = false; this.next.focus(); break;
      case "end": this.showResult(row.result); break;
      case "failed": this.end(row.reason, true); break;
      case "cancelled": this.end("stopped"); break;
    }
  }

  step(number) {
    while (this.steps.children.length < number) {
      const item = make("li");
      item.append(make("span", "number", `step ${this.steps.children.length + 1}`));
      this.steps.append(item);
    }
    return this.steps.children[number - 1];
  }

  block(number, part) {
    const step = this.step(number);
    let block = step.querySelector(`:scope > .${part}`);
    if (!block) {
      block = make("div", `block ${part}`);
      block.append(make("span", "label", part), make("div", "text"));
      step.append(block);
    }
    return block;
  }

  settle() {
    for (const block of this.steps.querySelectorAll(".writing")) block.classList.remove("writing");
  }

  write(row) {
    this.settle();
    const block = this.block(row.step, row.part);
    block.classList.add("writing");
    block.lastChild.append(row.text);
    this.say(`writing step ${row.step}`);
  }

  showStep(row) {
    this.settle();
    const parts = row.is_well_formed ? { analysis: row.analysis, query: row.query, answer: row.answer } : { malformed: row.analysis };
    for (const block of this.step(row.step).querySelectorAll(":scope > .block")) block.remove();
    for (const [part, text] of Object.entries(parts)) if (text) this.block(row.step, part).lastChild.textContent = text;
  }

  showPassages(row) {
    const block = make("div", "block passages");
    block.append(make("span", "label", "passages"));
    for (const passage of row.passages) block.append(passageElement(passage));
    if (!row.passages.length) block.append(make("span", "snippet", "nothing new was found"));
    this.step(row.step).append(block);
    this.say("reading");
  }

  showResult(result) {
    this.result = result;
    const labels = { right: "✓ right", wrong: "✗ wrong", unknown: "answered" };
    const reasons = { FORMAT_ERROR: "✗ malformed step", CONTEXT_FULL: "✗ context full" };
    const label = labels[result.outcome] || reasons[result.status] || "✗ no answer";
    this.facts.append(make("span", `badge ${result.outcome}`, label));
    const facts = [];
    if (result.golden_answers.length) facts.push(`gold: ${result.golden_answers.join(" / ")}`);
    const searches = result.steps.filter((step) => step.query !== undefined);
    facts.push(`${searches.length} retrieval${searches.length === 1 ? "" : "s"}`);
    const supporting = new Set((result.metadata.supporting_ids || []).map(String));
    if (supporting.size) {
      const found = searches.flatMap((step) => step.passages).filter((passage) => supporting.has(passage.id));
      facts.push(`★ ${found.length} of ${supporting.size} supporting passages found`);
    }
    facts.push(`${result.num_tokens} tokens`);
    for (const fact of facts) this.facts.append(make("span", "fact", fact));
    this.end("finished");
  }
}

function passageElement(passage) {
  const isLong = passage.text.length > LONG_PASSAGE;
  const root = make(isLong ? "details" : "div", "passage");
  const head = isLong ? make("summary") : root;
  if (passage.is_supporting) {
    const mark = make("span", "mark", "★");
    mark.title = "supporting passage";
    head.append(mark, " ");
  }
  if (passage.title) head.append(make("span", "title", passage.title));
  if (isLong) head.append(make("span", "snippet", `${passage.text.slice(0, 140)}…`));
  const source = make("span", "source", `${passage.id} · ${passage.score.toPrecision(3)}`);
  source.title = "source and score";
  if (isLong) root.append(head, passage.text, " ", source);
  else root.append(passage.text, " ", source);
  return root;
}

// ---- the form

const NUMBERS = ["k", "steps", "temperature", "seed"];

function values() {
  const found = { question: byId("question").value.trim(), policy: byId("policy").value, retriever: byId("retriever").value };
  for (const name of NUMBERS) found[name] = byId(name).valueAsNumber;
  return { ...found, single_steps: byId("single").checked };
}

function fragment() {
  const { question, single_steps: single, ...others } = values();
  const compare = byId("compare").checked;
  return `#${new URLSearchParams({ q: question, ...others, ...(single && { single: 1 }), ...(compare && { compare: 1 }) })}`;
}

function fill(parameters) {
  byId("question").value = parameters.get("q") || "";
  for (const name of ["policy", "retriever"]) {
    const wanted = parameters.get(name);
    if ([...byId(name).options].some((option) => option.value === wanted)) byId(name).value = wanted;
  }
  for (const name of NUMBERS) if (parameters.has(name)) byId(name).value = parameters.get(name);
  byId("single").checked = parameters.has("single");
  byId("compare").checked = parameters.has("compare") && settings.policies.length > 1;
  byId("policy").disabled = byId("compare").checked;
}

function ask() {
  byId("fault").hidden = true;
  if (!settings || !byId("form").reportValidity()) return;
  for (const card of cards) card.stop();
  const { policy, ...body } = values();
  if (!body.question) return;
  const played = byId("compare").checked ? [...settings.policies].reverse() : settings.policies.filter((one) => one.name === policy);
  cards = played.map((one) => new Card(one.name, one.title));
  byId("results").replaceChildren(...cards.map((card) => card.root));
  document.querySelector(".page").classList.toggle("wide", cards.length > 1);
  byId("asked").textContent = body.question;
  byId("after").hidden = false;
  byId("link").href = fragment();

  history.replaceState(null, "", fragment());
  for (const card of cards) card.play({ ...body, policy: card.policy });
  if (matchMedia("(max-width: 40rem)").matches) byId("asked").scrollIntoView();
  update();
}

function stop() {
  for (const card of cards) card.stop();
}

function update() {
  byId("stop").disabled = !cards.some((card) => !card.isOver);
  byId("download").disabled = !cards.some((card) => card.result);
}

function download() {
  const results = cards.filter((card) => card.result).map((card) => card.result);
  const file = new Blob([`${JSON.stringify(results, null, 2)}\n`], { type: "application/json" });
  const link = make("a");
  link.href = URL.createObjectURL(file);
  link.download = "r3rag.json";
  link.click();
  URL.revokeObjectURL(link.href);
}

// ---- start

function show(found) {
  settings = found;
  byId("title").textContent = found.title;
  document.title = `${found.title} – R3-RAG demo`;
  for (const [name, choices] of [["policy", found.policies], ["retriever", found.retrievers]]) {
    byId(name).replaceChildren(...choices.map((choice) => Object.assign(make("option", "", choice.title), { value: choice.name })));
  }
  for (const name of NUMBERS) byId(name).value = found.defaults[name];
  for (const name of ["k", "steps", "temperature"]) byId(name).max = found.limits[name];
  byId("question").maxLength = found.limits.question_chars;
  byId("compare-row").hidden = found.policies.length < 2;
  byId("compare-label").textContent = `Compare ${found.policies.map((one) => one.title).reverse().join(" and ")}`;
  byId("examples").hidden = !found.examples.length;
  for (const question of found.examples) {
    const button = make("button", "", question);
    button.type = "button";
    button.addEventListener("click", () => { byId("question").value = question; ask(); });
    byId("examples").append(button);
  }
  byId("ask").disabled = false;
  byId("token-row").hidden = true;
  if (location.hash.length > 1) {
    fill(new URLSearchParams(location.hash.slice(1)));
    ask();
  } else byId("question").focus();
}

async function load() {
  try {
    show(await (await request("/v1/settings")).json());
  } catch (error) {
    if (error.status !== 401) setTimeout(load, RETRY_MS);
    byId("title").textContent = error.status === 401 ? "An access token is needed" : "Loading the model …";
  }
}

byId("form").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
byId("stop").addEventListener("click", stop);
byId("download").addEventListener("click", download);
byId("compare").addEventListener("change", () => { byId("policy").disabled = byId("compare").checked; });
byId("token").addEventListener("change", () => { sessionStorage.setItem("token", byId("token").value); load(); });
window.addEventListener("hashchange", () => { if (settings && location.hash.length > 1) { fill(new URLSearchParams(location.hash.slice(1))); ask(); } });
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
  const isTyping = event.target.matches("input:not([type=checkbox]), select");
  if (event.key.toLowerCase() === "n" && !isTyping && !event.ctrlKey && !event.metaKey && !event.altKey) {
    const card = cards.find((one) => !one.pause.hidden);
    if (card) card.goOn(true);
  }
});
load();
