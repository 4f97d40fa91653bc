// ---- the time line ----

const columnWidth = () => parseFloat(getComputedStyle(document.documentElement).getPropertyValue("--col"));

function drawTimeline() {
  const stream = current();
  const lanes = lanesOf(stream);
  const rows = [["axis", "turn, time"], ["frame", "video"], ["asked", "question"], ["due", "expected"]];
  for (const name of lanes) {
    rows.push(["lane", labels[name]], ["band", "held"], ["thought", "thought"], ["said", "says"], ["bar", "tokens"]);
  }
  $("gutter").replaceChildren(...rows.map(([row, name]) => el("div", { class: `r-${row}` }, name)));
  state.most = Math.max(1, ...lanes.flatMap((name) => runOf(stream, name).turns.map((turn) => turn.live_tokens || 0)));
  columns.clear();
  $("track").replaceChildren();
  $("track").style.width = `${turnsOf(stream) * columnWidth()}px`;
  $("track").style.height = `${$("gutter").getBoundingClientRect().height}px`;
  drawColumns();
}

function drawColumns() {
  const stream = current();
  if (!stream) return;
  const width = columnWidth();
  const scroll = $("scroll");
  const count = turnsOf(stream);
  const first = Math.max(0, Math.floor(scroll.scrollLeft / width) - AROUND);
  const last = Math.min(count - 1, Math.ceil((scroll.scrollLeft + scroll.clientWidth) / width) + AROUND);
  for (const [turn, node] of columns) {
    if (turn < first || turn > last) { node.remove(); columns.delete(turn); }
  }
  for (let turn = first; turn <= last; turn += 1) {
    if (columns.has(turn)) continue;
    const node = column(stream, turn, width, count);
    columns.set(turn, node);
    $("track").append(node);
    paintMemory(turn, node);
  }
  const view = $("view");
  if (view) {
    view.setAttribute("x", scroll.scrollLeft / width);
    view.setAttribute("width", Math.min(count, scroll.clientWidth / width));
  }
}

function column(stream, turn, width, count) {
  const frame = stream.frames[turn];
  const due = dueAt(stream, turn);
  const score = windowAt(stream, turn);
  const asked = queriesAt(stream, turn).map((query) => query.text).join(" / ");
  const shade = score ? { background: `rgba(var(--window), ${0.06 + 0.24 * score})` } : {};
  return el(
    "div",
    {
      class: "col", "data-turn": turn, style: { left: `${turn * width}px` },
      onclick: () => goTo(turn, false),
      onpointermove: (event) => hover(turn, event), onpointerleave: () => hover(null),
    },
    el("div", { class: "r-axis" }, el("b", {}, String(turn)), clock(stream.start + turn * stream.chunk_seconds)),
    el("div", { class: "r-frame" }, frame
      ? el("img", { src: frame[frame.length - 1], alt: `frame of turn ${turn}`, draggable: "false" })
      : el("span", { class: "none" }, "no frame")),
    el("div", { class: "r-asked" }, asked
      ? el("div", { class: `asked-pill${turn > count - 4 && turn > 2 ? " flip" : ""}`, title: asked }, `? ${asked}`) : ""),
    el("div", { class: "r-due", style: shade, title: score ? `an answer here has timing ${share(score)}` : null },
      due.map((answer) => answer.text).join(", ")),
    ...lanesOf(stream).flatMap((name) => laneCells(runOf(stream, name), name, turn, shade)),
  );
}

function laneCells(run, name, turn, shade) {
  const entry = run.turns[turn];
  const cell = (row, ...children) => el("div", { class: `r-${row}` }, ...children);
  const said = el("div", { class: "r-said", style: shade });
  const bar = cell("bar");
  if (entry) {
    const outcome = outcomeAt(run, turn);
    const box = "response" in entry || entry.response === ""
      ? el("div", { class: `said-box ${outcome}`, title: entry.response }, `${SIGN[outcome]} ${entry.response || "(empty)"}`)
      : el("span", { class: "hush", title: "silent" }, "silent");
    if (!entry.well_formed) { box.classList.add("bad"); box.title = "not well-formed"; }
    said.append(box);
    const height = (tokens) => ({ height: `${(30 * tokens) / state.most}px` });
    const video = entry.video_tokens || 0;
    if (entry.live_tokens) {
      bar.append(el("span", {}, String(entry.live_tokens)), el("i", { class: "fill-text", style: height(entry.live_tokens - video) }),
        el("i", { class: "fill-video", style: height(video) }));
    }
  }
  return [
    cell("lane"),
    el("div", { class: "r-band", "data-run": name }, el("i", { class: "v" }), el("i", { class: "t" })),
    cell("thought", entry ? entry.thought : ""), said, bar,
  ];
}

// Which chunks and texts are in memory at the turn under the pointer, or at the selected one.
function paintMemory(turn, node) {
  const stream = current();
  const at = state.hover ?? state.turn;
  node.classList.toggle("on", turn === state.turn);
  lanesOf(stream).forEach((name, lane) => {
    const entry = runOf(stream, name).turns[turn] || {};
    const [video, text] = node.querySelector(`.r-band[data-run="${CSS.escape(name)}"]`).children;
    const paint = (bar, changes) => {
      const live = liveAt(changes, at);
      bar.classList.toggle("in", live > 0);
      bar.classList.toggle("part", live > 0 && live < mostLive(changes) && turn < at);
      bar.classList.toggle("future", turn > at);
      return live;
    };
    const live = paint(video, entry.video && entry.video.live);
    paint(text, entry.text_live);
    if (lane === 0) node.classList.toggle("out", live === 0 && turn <= at && Boolean(entry.video));
  });
}

function paintAll() {
  for (const [turn, node] of columns) paintMemory(turn, node);
  for (const label of $("gutter").querySelectorAll(".r-band")) label.textContent = `held at ${state.hover ?? state.turn}`;
  const now = $("now");
  if (now) for (const x of ["x1", "x2"]) now.setAttribute(x, (state.hover ?? state.turn) + 0.5);
}

// Only a pointer that moves: the time line also slides under one that rests.
function hover(turn, event) {
  if (turn === state.hover || (event && !event.movementX && !event.movementY)) return;
  state.hover = turn;
  paintAll();
}

function goTo(turn, scroll = true) {
  state.turn = Math.max(0, Math.min(turn, turnsOf(current()) - 1));
  state.hover = null;
  if (scroll) scrollToTurn();
  paintAll();
  drawDetail();
  remember();
}

function scrollToTurn() {
  const width = columnWidth();
  const scroll = $("scroll");
  const left = state.turn * width;
  const margin = Math.min(2 * width, scroll.clientWidth / 4);
  if (left < scroll.scrollLeft + margin) scroll.scrollLeft = left - margin;
  else if (left + width > scroll.scrollLeft + scroll.clientWidth - margin) scroll.scrollLeft = left + width + margin - scroll.clientWidth;
  drawColumns();
  paintAll();
}
