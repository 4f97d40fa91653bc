// The transcripts' page. Everything from data is shown through textContent: nothing in it can become markup.
const DATA = JSON.parse(document.getElementById("data").textContent);
const STREAMS = DATA.streams;
const RESULTS = DATA.results;
const SIGN = { right: "✓", late: "→", early: "←", wrong: "✕", silent: "–", spare: "·" };
const OUTCOMES = ["right", "late", "early", "wrong", "silent"];
const AROUND = 4; // columns drawn beyond each edge of the visible part
const $ = (id) => document.getElementById(id);
const labels = Object.fromEntries(RESULTS.map((r) => [r.name, r.label]));

const state = { list: [], index: 0, turn: 0, hover: null, lanes: [RESULTS[0].name], outcomes: new Set() };
const columns = new Map();

function el(tag, props, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props || {})) {
    if (value === undefined || value === null) continue;
    if (key === "class") node.className = value;
    else if (key === "style") Object.assign(node.style, value);
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}
const svg = (tag, props) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(props)) node.setAttribute(key, value);
  return node;
};
const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
const share = (x) => (x === null || x === undefined ? "–" : x.toFixed(2));
const clock = (s) => {
  const rounded = Math.round(s * 10) / 10;
  const minutes = Math.floor(rounded / 60);
  const seconds = rounded - 60 * minutes;
  const shown = Number.isInteger(seconds) ? String(seconds).padStart(2, "0") : seconds.toFixed(1).padStart(4, "0");
  return `${minutes}:${shown}`;
};

// ---- what the data say ----

const current = () => state.list[state.index];
const runOf = (stream, name) => stream.runs[name];
const mainRun = (stream) => stream.runs[state.lanes[0]] || Object.values(stream.runs)[0];
const lanesOf = (stream) => {
  const shown = state.lanes.filter((name) => stream.runs[name]);
  return shown.length ? shown : [Object.keys(stream.runs)[0]];
};
const outcomesOf = (stream) =>
  [...new Set(lanesOf(stream).flatMap((name) => stream.runs[name].answers.map((answer) => answer.outcome)))];
const turnsOf = (stream) => Math.max(...Object.values(stream.runs).map((run) => run.turns.length));
function liveAt(changes, turn) {
  let live = 0;
  for (const [since, count] of changes || []) {
    if (since > turn) break;
    live = count;
  }
  return live;
}
const mostLive = (changes) => Math.max(0, ...(changes || []).map((change) => change[1]));
function answerAt(run, turn) {
  const index = run.answers.findIndex((answer) => answer.response_turn === turn);
  return index < 0 ? null : { index, ...run.answers[index] };
}
const outcomeAt = (run, turn) => (answerAt(run, turn) || { outcome: "spare" }).outcome;
function windowAt(stream, turn) {
  let best = 0;
  for (const answer of stream.answers) for (const [t, score] of answer.window) if (t === turn) best = Math.max(best, score);
  return best;
}
const dueAt = (stream, turn) => stream.answers.filter((answer) => answer.due_turn === turn);
const queriesAt = (stream, turn) => stream.queries.filter((query) => query.turn === turn);
function spans(turns) {
  const found = [];
  for (const turn of turns) {
    const last = found[found.length - 1];
    if (last && turn === last[1] + 1) last[1] = turn;
    else found.push([turn, turn]);
  }
  return found.map(([a, b]) => (a === b ? String(a) : `${a}–${b}`)).join(", ");
}
function change(stream) {
  const rewards = RESULTS.map((r) => stream.runs[r.name]).filter(Boolean).map((run) => run.reward);
  return rewards.length > 1 ? rewards[0] - rewards[1] : 0;
}
for (const stream of STREAMS) {
  const said = Object.values(stream.runs).flatMap((run) => run.turns.flatMap((turn) => [turn.thought, turn.response]));
  const asked = [...stream.queries.map((q) => q.text), ...stream.answers.map((a) => a.text)];
  stream.haystack = [stream.task, stream.category, ...asked, ...said].filter(Boolean).join("\n").toLowerCase();
}
