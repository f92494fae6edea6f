"use strict";
// The explorer of trajectories: filters, a histogram of rewards, a list and one trajectory or its whole group.
// All texts are inserted as text; lists are drawn when they are shown.
(() => {
const PAGE = 60, BINS = 24;  // rows of the list at a time, bars of the histogram
const OUTCOMES = [["", "all"], ["right", "right"], ["wrong", "wrong"], ["none", "no answer"], ["unknown", "not known"]];
const SHADES = {advantage: ["av", "advantage"], logprob: ["lp", "log-probability"], entropy: ["en", "entropy"]};
const byId = id => document.getElementById(id);
let passages = [], items = [], shown = [], listed = 0;
const state = {source: "", iteration: "", type: "", outcome: "", status: "", low: "", high: "", text: "", group: false, shade: "", open: ""};

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter(child => child !== null && child !== undefined));
  return node;
}

const signed = value => (value >= 0 ? "+" : "−") + Math.abs(value).toFixed(2);

// ---------------------------------------------------------------- data

function load() {
  const block = byId("trajectories-data");
  const data = JSON.parse(block.textContent);
  block.textContent = "";  // it may be megabytes
  passages = data.passages;
  items = data.sources.flatMap(source => source.items.map((item, number) =>
    Object.assign(item, {source: source.name, title: source.title, key: source.name + "." + number})));
  items.forEach(item => { item.words = null; });
}

function wordsOf(item) {  // what the text filter searches, made when it is first needed
  if (item.words === null) {
    const steps = item.steps.map(step => [step.a, step.q || "", step.ans || "", ...step.p.map(n => passages[n].join(" "))].join(" "));
    item.words = [item.q, item.id, ...item.gold, ...steps].join(" ").toLowerCase();
  }
  return item.words;
}

function fits(item, withReward) {
  const low = parseFloat(state.low), high = parseFloat(state.high);
  return item.source === state.source
    && (!state.iteration || String(item.i) === state.iteration)
    && (!state.type || item.type === state.type)
    && (!state.outcome || item.kind === state.outcome)
    && (!state.status || item.status === state.status)
    && (!withReward || ((isNaN(low) || item.r >= low) && (isNaN(high) || item.r <= high)))
    && (!state.text || wordsOf(item).includes(state.text.toLowerCase()));
}

function mates(item) {  // its group in RL; in evaluations the other systems' trajectories of the same question
  const isRollout = item.i !== undefined;
  return items.filter(other => other.id === item.id && (isRollout ? other.source === item.source && other.i === item.i : other.i === undefined));
}

// ---------------------------------------------------------------- filters

function choice(label, name, options) {
  const select = make("select", {id: "filter-" + name, onchange: event => { state[name] = event.target.value; changed(name); }});
  for (const [value, text] of options) select.append(make("option", {value, selected: state[name] === value}, text));
  return make("label", {}, label, select);
}

function typed(label, name, type, extra = {}) {
  const input = make("input", {id: "filter-" + name, type, value: state[name], ...extra,
    oninput: event => { state[name] = event.target.value; changed(name); }});
  return make("label", {}, label, input);
}

function distinct(read) {
  return [...new Set(items.filter(item => item.source === state.source).map(read))].filter(value => value !== undefined && value !== "");
}

function drawFilters() {
  const sources = [...new Map(items.map(item => [item.source, item.title]))];
  const iterations = distinct(item => item.i).sort((a, b) => a - b);
  const every = values => [["", "all"], ...values.map(value => [String(value), String(value)])];
  byId("filters").replaceChildren(
    choice("trajectories of", "source", sources),
    ...(iterations.length ? [choice("iteration", "iteration", every(iterations))] : []),
    ...(distinct(item => item.type).length > 1 ? [choice("type", "type", every(distinct(item => item.type)))] : []),
    choice("outcome", "outcome", OUTCOMES),
    choice("status", "status", every(distinct(item => item.status))),
    ...(iterations.length ? [typed("reward from", "low", "number", {step: "any"}), typed("to", "high", "number", {step: "any"})] : []),
    typed("text", "text", "search", {placeholder: "question, step or passage", "aria-keyshortcuts": "/"}),
    make("button", {type: "button", id: "reset", onclick: reset}, "all again"));
}

function reset() {
  Object.assign(state, {iteration: "", type: "", outcome: "", status: "", low: "", high: "", text: ""});
  drawFilters();
  apply();
}

function changed(name) {
  if (name === "source") reset();
  else apply();
}

// ---------------------------------------------------------------- histogram

function drawHistogram() {
  const box = byId("histogram"), of = items.filter(item => fits(item, false) && item.r !== undefined);
  box.replaceChildren();
  box.hidden = of.length === 0;
  if (!of.length) return;
  const all = items.filter(item => item.source === state.source && item.r !== undefined).map(item => item.r);
  const lowest = Math.min(...all), highest = Math.max(...all), width = (highest - lowest) / BINS || 1;
  const counts = Array(BINS).fill(0);
  for (const item of of) counts[Math.min(BINS - 1, Math.floor((item.r - lowest) / width))] += 1;
  const most = Math.max(...counts);
  const bars = make("div", {class: "bars"});
  counts.forEach((count, bin) => {
    const low = (lowest + bin * width).toFixed(3), high = (lowest + (bin + 1) * width).toFixed(3);
    const pressed = state.low === low && state.high === high;
    const bar = make("button", {type: "button", class: "bin", disabled: count === 0, "aria-pressed": String(pressed),
      "aria-label": `reward ${low} to ${high}: ${count} trajectories`, title: `${low} to ${high}: ${count}`,
      onclick: () => {
        Object.assign(state, pressed ? {low: "", high: ""} : {low, high});
        drawFilters();
        apply();
        byId("histogram").querySelectorAll(".bin")[bin].focus();
      }}, make("i"));
    bar.firstChild.style.height = (count ? Math.max(4, 100 * count / most) : 0) + "%";
    bars.append(bar);
  });
  box.append(make("p", {class: "caption"}, "reward, ", make("b", {}, String(of.length)), " trajectories; the tallest bar has " + most),
    bars, make("p", {class: "ends"}, make("span", {}, lowest.toFixed(2)), make("span", {}, highest.toFixed(2))));
}

// ---------------------------------------------------------------- list

function badge(item) { return make("span", {class: "badge " + item.kind}, item.label); }

function row(item) {
  const facts = [item.i === undefined ? null : "iteration " + item.i, item.r === undefined ? null : "reward " + item.r.toFixed(2), item.type || null];
  return make("li", {}, make("button", {type: "button", "data-key": item.key, "aria-current": String(item.key === state.open),
    onclick: () => open(item.key, true)}, make("span", {class: "asked"}, item.q),
    make("span", {class: "facts"}, badge(item), " ", facts.filter(Boolean).join(" · "))));
}

function drawMore() {
  const list = byId("list"), button = byId("more");
  if (button) button.parentNode.remove();
  list.append(...shown.slice(listed, listed + PAGE).map(row));
  listed = Math.min(shown.length, listed + PAGE);
  if (listed < shown.length) list.append(make("li", {}, make("button", {type: "button", id: "more", onclick: drawMore}, `${shown.length - listed} more`)));
}

function apply() {
  shown = items.filter(item => fits(item, true));
  const num = items.filter(item => item.source === state.source).length;
  byId("found").textContent = `${shown.length} of ${num} trajectories`;
  drawHistogram();
  byId("list").replaceChildren();
  listed = 0;
  drawMore();
  if (!shown.some(item => item.key === state.open)) state.open = shown.length ? shown[0].key : "";
  drawDetail();
}

// ---------------------------------------------------------------- one trajectory

function block(kind, text) {
  return make("div", {class: "block " + kind}, make("span", {class: "label"}, kind), make("div", {class: "text"}, text));
}

function passage(number, item) {
  const [title, text] = passages[number];
  const mark = item.sup.includes(number) ? make("span", {class: "mark", title: "supporting passage"}, "★ ") : null;
  if (text.length <= 260) return make("div", {class: "passage"}, mark, make("span", {class: "title"}, title), text);
  return make("details", {class: "passage"}, make("summary", {}, mark, make("span", {class: "title"}, title),
    make("span", {class: "snippet"}, text.slice(0, 140) + "…")), text);
}

function shadeOf(step) {  // the values of the chosen shading, or null
  if (!state.shade || !step.t) return null;
  const values = step[SHADES[state.shade][0]];
  if (values) return values;
  return state.shade === "advantage" && step.adv !== undefined ? step.t.map(() => step.adv) : null;
}

function strongest(group) {  // the scale of shading, one for all that is on the screen
  const values = group.flatMap(item => item.steps.flatMap(step => shadeOf(step) || []));
  return Math.max(1e-6, ...values.map(Math.abs));
}

function tokens(step, values, most) {
  const text = make("div", {class: "text"});
  step.t.forEach((token, place) => {
    const value = values[place], span = make("span", {class: state.shade === "advantage" && value > 0 ? "up" : "down",
      title: `${SHADES[state.shade][1]} ${value}`}, token);
    span.style.setProperty("--strength", Math.round(45 * Math.min(1, Math.abs(value) / most)) + "%");
    text.append(span);
  });
  return make("div", {class: "block tokens"}, make("span", {class: "label"}, SHADES[state.shade][1] + " of each token"), text);
}

function stepOf(step, number, item, most) {
  const earned = [step.r === undefined ? null : "reward " + signed(step.r), step.adv === undefined ? null : "advantage " + signed(step.adv)];
  const head = make("span", {class: "number"}, [`step ${number + 1}`, ...earned.filter(Boolean)].join(" · "));
  const values = shadeOf(step), li = make("li", {}, head);
  if (values) li.append(tokens(step, values, most));
  else if (step.bad) li.append(block("malformed", step.a));
  else {
    if (step.a) li.append(block("analysis", step.a));
    if (step.q !== undefined) li.append(block("query", step.q));
  }
  if (!step.bad && step.q !== undefined) li.append(make("div", {class: "block passages"}, make("span", {class: "label"}, "passages"),
    ...(step.p.length ? step.p.map(number => passage(number, item)) : [make("span", {class: "snippet"}, "nothing new was found")])));
  if (!values && !step.bad && step.ans !== undefined) li.append(block("answer", step.ans));
  return li;
}

function facts(item) {
  const searches = item.steps.filter(step => step.q !== undefined).length;
  const texts = [item.gold.length ? "gold: " + item.gold.join(" / ") : null, item.type || null,
    searches + (searches === 1 ? " retrieval" : " retrievals"), item.nsup ? `★ ${item.sup.length} of ${item.nsup} supporting passages found` : null,
    item.r === undefined ? null : "reward " + item.r.toFixed(2)];
  return make("p", {class: "facts"}, badge(item), ...texts.filter(Boolean).map(text => make("span", {class: "fact"}, text)));
}

function trajectory(item, most) {
  return make("div", {class: "trajectory"}, facts(item), make("ol", {class: "steps"}, ...item.steps.map((step, number) => stepOf(step, number, item, most))));
}

function titleOf(item) { return item.i === undefined ? item.title : `sample ${item.s}`; }

function groupTable(group) {
  const num = Math.max(...group.map(item => item.steps.length)), steps = [...Array(num).keys()];
  const most = Math.max(1e-6, ...group.flatMap(item => item.steps.map(step => Math.abs(step.adv || 0))));
  const cell = step => {
    const td = make("td", {}, step && step.adv !== undefined ? signed(step.adv) : "");
    if (step && step.adv) {
      td.className = step.adv > 0 ? "up" : "down";
      td.style.setProperty("--strength", Math.round(45 * Math.abs(step.adv) / most) + "%");
    }
    return td;
  };
  return make("div", {class: "scroll", tabindex: "0", role: "region", "aria-label": "advantages of the group"}, make("table", {class: "group"},
    make("thead", {}, make("tr", {}, ...["sample", "outcome", "reward", ...steps.map(k => `step ${k + 1}`)].map(text => make("th", {scope: "col"}, text)))),
    make("tbody", {}, ...group.map(item => make("tr", {}, make("th", {scope: "row"}, titleOf(item)),
      make("td", {}, badge(item)), make("td", {}, item.r === undefined ? "" : item.r.toFixed(2)), ...steps.map(k => cell(item.steps[k])))))));
}

function drawDetail() {
  const box = byId("detail"), item = items.find(one => one.key === state.open);
  byId("list").querySelectorAll("[data-key]").forEach(button => button.setAttribute("aria-current", String(button.dataset.key === state.open)));
  box.replaceChildren();
  if (!item) { box.append(make("p", {class: "missing"}, "No trajectory fits these filters.")); remember(); return; }
  const group = mates(item), isGroup = state.group && group.length > 1, on = isGroup ? group : [item];
  const kinds = Object.entries(SHADES).filter(([name, [short]]) => on.some(one => one.steps.some(step => step.t && (step[short] || (name === "advantage" && step.adv !== undefined)))));
  const shade = make("select", {id: "shade", "aria-keyshortcuts": "s", onchange: event => { state.shade = event.target.value; drawDetail(); byId("shade").focus(); }},
    make("option", {value: ""}, "by author"), ...kinds.map(([name, [, text]]) => make("option", {value: name, selected: state.shade === name}, text)));
  const most = strongest(on);
  box.append(make("h3", {class: "question"}, item.q), make("p", {class: "tools"},
    make("button", {type: "button", onclick: () => move(-1), "aria-keyshortcuts": "k"}, "previous"), make("button", {type: "button", onclick: () => move(1), "aria-keyshortcuts": "j"}, "next"),
    group.length > 1 ? make("button", {type: "button", id: "group", "aria-pressed": String(isGroup), "aria-keyshortcuts": "g", onclick: toggleGroup},
      item.i === undefined ? `beside the other ${group.length - 1}` : `all ${group.length} samples`) : null,
    kinds.length ? make("label", {}, "colours ", shade) : null, make("a", {href: remember()}, "link")));
  if (!isGroup) { box.append(trajectory(item, most)); return; }
  box.append(...(item.i === undefined ? [] : [groupTable(group)]), make("div", {class: "side-by-side", tabindex: "0", role: "region", "aria-label": "samples of the question"},
    ...group.map(one => make("section", {"aria-label": titleOf(one)}, make("h4", {}, titleOf(one)), trajectory(one, most)))));
}

function open(key, isChosen) {
  state.open = key;
  drawDetail();
  if (isChosen && window.matchMedia("(max-width: 56rem)").matches) byId("detail").scrollIntoView();
}

function move(by) {
  const place = shown.findIndex(item => item.key === state.open) + by;
  if (place < 0 || place >= shown.length) return;
  while (listed <= place) drawMore();
  open(shown[place].key, false);
  const button = byId("list").querySelector('[aria-current="true"]');
  if (button) button.scrollIntoView({block: "nearest"});
}

function toggleGroup() {
  state.group = !state.group;
  drawDetail();
  const button = byId("group");
  if (button) button.focus();
}

// ---------------------------------------------------------------- keys and links

function remember() {
  const words = new URLSearchParams({show: state.open});
  if (state.group) words.set("group", "1");
  if (state.shade) words.set("shade", state.shade);
  return "#" + words;
}

function recall() {
  const words = new URLSearchParams(location.hash.slice(1)), item = items.find(one => one.key === words.get("show"));
  if (!item) return false;
  Object.assign(state, {source: item.source, iteration: "", type: "", outcome: "", status: "", low: "", high: "", text: "",
    open: item.key, group: words.has("group"), shade: words.get("shade") in SHADES ? words.get("shade") : ""});
  return true;
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const isTyping = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
  if (event.key === "Escape") { if (isTyping) event.target.blur(); reset(); return; }
  if (isTyping) return;
  const acts = {j: () => move(1), k: () => move(-1), g: toggleGroup, s: () => {
    const names = ["", ...[...byId("shade")?.options || []].map(option => option.value).filter(Boolean)];
    state.shade = names[(names.indexOf(state.shade) + 1) % names.length];
    drawDetail();
  }, "/": () => byId("filter-text").focus()};
  if (!(event.key in acts)) return;
  event.preventDefault();
  acts[event.key]();
}

function start() {
  load();
  if (!items.length) return;
  const kept = items.some(item => item.key === state.open);
  if (!recall() && !kept) state.source = items[0].source;
  drawFilters();
  apply();
}

if (byId("explorer")) {
  start();
  document.addEventListener("keydown", onKey);
  window.addEventListener("hashchange", () => { if (recall()) { drawFilters(); apply(); byId("explorer").scrollIntoView(); } });
  document.addEventListener("renewed", () => {  // a page that is watched has new data
    const id = document.activeElement.id;
    start();
    if (id && byId(id)) byId(id).focus();
  });
}
})();
