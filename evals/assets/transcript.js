"use strict";
// The transcripts' page. Everything from data is shown through textContent: nothing in it can become markup.
(() => {
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
  const share = (x) => (x === null || x === undefined ? "–" : x.toFixed(3).replace(/\.?0+$/, "") || "0");
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

  // ---- the list ----

  function refreshList(keep) {
    const wanted = $("search").value.trim().toLowerCase();
    const category = $("category").value;
    const inCategory = STREAMS.filter((stream) => !category || stream.category === category);
    const found = inCategory.filter((stream) => !wanted || stream.haystack.includes(wanted));
    const counts = Object.fromEntries(OUTCOMES.map((name) => [name, 0]));
    for (const stream of found) for (const name of new Set(mainRun(stream).answers.map((a) => a.outcome))) counts[name] += 1;
    drawOutcomes(counts);
    const list = found.filter(
      (stream) => !state.outcomes.size || mainRun(stream).answers.some((answer) => state.outcomes.has(answer.outcome)),
    );
    const orders = {
      low: (a, b) => mainRun(a).reward - mainRun(b).reward,
      high: (a, b) => mainRun(b).reward - mainRun(a).reward,
      change: (a, b) => Math.abs(change(b)) - Math.abs(change(a)),
      task: (a, b) => a.task.localeCompare(b.task),
    };
    if (orders[$("sort").value]) list.sort(orders[$("sort").value]);
    state.list = list;
    $("count").textContent = `${list.length} of ${plural(STREAMS.length, "stream")}`;
    $("list").replaceChildren(...list.map(listItem));
    const index = list.indexOf(keep);
    if (index >= 0) {
      state.index = index;
      markSelected();
    } else if (list.length) {
      select(0);
    } else {
      showNothing();
    }
  }

  function drawOutcomes(counts) {
    $("outcomes").replaceChildren(
      ...OUTCOMES.map((name) =>
        el(
          "button",
          {
            class: "chip", type: "button", "aria-pressed": state.outcomes.has(name), "data-outcome": name,
            disabled: counts[name] || state.outcomes.has(name) ? null : "",
            onclick: () => {
              if (!state.outcomes.delete(name)) state.outcomes.add(name);
              refreshList(current());
              document.querySelector(`[data-outcome=${name}]`).focus();
            },
          },
          `${SIGN[name]} ${name} ${counts[name]}`,
        ),
      ),
    );
  }

  function listItem(stream, index) {
    const run = mainRun(stream);
    const delta = change(stream);
    return el(
      "li",
      { role: "option", id: `stream-${index}`, "aria-selected": "false", onclick: () => select(index) },
      el("div", { class: "name" }, el("span", { title: stream.task }, stream.task), el("span", {}, share(run.reward))),
      el("div", { class: "asked" }, stream.queries.map((query) => query.text).join(" / ")),
      el(
        "div",
        { class: "marks" },
        el("span", { class: "meter" }, el("i", { style: { width: `${100 * run.reward}%` } })),
        ...run.answers.slice(0, 6).map((a) => el("span", { class: `tag ${a.outcome}` }, `${SIGN[a.outcome]} ${a.outcome}`)),
        run.answers.length > 6 ? `+${run.answers.length - 6}` : "",
        run.failed ? el("span", { class: "tag wrong" }, "could not run") : "",
        Math.abs(delta) > 1e-9 && RESULTS.length > 1
          ? el("span", { class: "muted", title: `${labels[RESULTS[0].name]} against ${labels[RESULTS[1].name]}` },
              `${delta > 0 ? "+" : "−"}${share(Math.abs(delta))}`)
          : "",
      ),
    );
  }

  function markSelected() {
    for (const item of $("list").children) item.setAttribute("aria-selected", String(item.id === `stream-${state.index}`));
    $("list").setAttribute("aria-activedescendant", `stream-${state.index}`);
    // Only the list scrolls: scrolling the item into view would move a narrow page, too.
    const item = $(`stream-${state.index}`);
    const list = $("list");
    const top = item.offsetTop - list.offsetTop;
    if (top < list.scrollTop) list.scrollTop = top;
    else if (top + item.offsetHeight > list.scrollTop + list.clientHeight) list.scrollTop = top + item.offsetHeight - list.clientHeight;
  }

  function select(index, turn) {
    state.index = Math.max(0, Math.min(index, state.list.length - 1));
    markSelected();
    const stream = current();
    const said = mainRun(stream).answers.map((answer) => answer.response_turn).find((t) => t !== null && t !== undefined);
    const due = stream.answers.length ? stream.answers[0].due_turn : 0;
    state.turn = Math.min(turn ?? said ?? due, turnsOf(stream) - 1);
    state.hover = null;
    drawStream();
  }

  function showNothing() {
    for (const id of ["lanes", "overview", "gutter", "track", "detail"]) $(id).replaceChildren();
    columns.clear();
    $("head").replaceChildren(el("p", { class: "muted" }, "No stream fits these filters."));
  }

  // ---- the stream ----

  function drawStream() {
    drawHead();
    drawLaneChips();
    drawOverview();
    drawTimeline();
    drawDetail();
    scrollToTurn();
    remember();
  }

  function drawHead() {
    const stream = current();
    const run = mainRun(stream);
    const policy = run.policy ? `${run.policy.name}${run.policy.window ? `, window ${run.policy.window}` : ""}` : "";
    const facts = [plural(turnsOf(stream), "turn"), `chunks of ${stream.chunk_seconds} s`, policy && `memory ${policy}`];
    if (run.versions.length) facts.push(`weights version ${run.versions.join(", ")}`);
    if (stream.frames_note) facts.push(stream.frames_note);
    const problems = Object.entries(stream.runs).flatMap(([name, r]) =>
      [r.failed, r.reward_failed].filter(Boolean).map((why) => el("p", { class: "failed" }, `${labels[name]}: ${why}`)),
    );
    $("head").replaceChildren(
      el("div", { class: "title" }, el("h2", {}, stream.task), el("span", { class: "tag silent" }, stream.category)),
      el("p", { class: "muted small", title: stream.video }, `${stream.video.split("/").pop()} · ${facts.filter(Boolean).join(" · ")}`),
      ...problems,
      el("div", { class: "tablewrap" }, answersTable(stream)),
    );
  }

  function answersTable(stream) {
    const terms = [...new Set(Object.values(stream.runs).flatMap((run) => Object.keys(run.components)))].sort();
    const head = ["Question", "Expected", "Due", "Result", "Answer", "At", ""].map((name) => el("th", {}, name));
    const body = stream.answers.flatMap((answer, index) =>
      Object.entries(stream.runs).map(([name, run], row) => {
        const got = run.answers[index];
        const spoke = got.response_turn !== null && got.response_turn !== undefined;
        const late = spoke ? got.response_turn - answer.due_turn : 0;
        const count = Object.keys(stream.runs).length;
        return el(
          "tr",
          { "data-turn": spoke ? got.response_turn : answer.due_turn, onclick: () => goTo(spoke ? got.response_turn : answer.due_turn) },
          ...(row === 0
            ? [
                el("td", { class: "wide", rowspan: count }, stream.queries[answer.query].text),
                el("td", { rowspan: count }, el("b", {}, answer.text), el("span", { class: "muted" }, ` ${answer.kind}`)),
                el("td", { rowspan: count }, `turn ${answer.due_turn}, ${clock(answer.time)}`),
              ]
            : []),
          el("td", {}, labels[name]),
          el("td", { class: "wide" }, spoke ? got.response || "(empty)" : el("span", { class: "muted" }, "none")),
          el("td", {}, spoke ? `turn ${got.response_turn}${late ? ` (${late > 0 ? "+" : "−"}${Math.abs(late)})` : ""}` : "–"),
          el("td", {}, el("span", { class: `tag ${got.outcome}` }, `${SIGN[got.outcome]} ${got.outcome}`)),
          ...terms.map((term) => el("td", { class: "num" }, share(got.components[term]))),
          el("td", { class: "num" }, el("b", {}, share(got.value))),
        );
      }),
    );
    return el(
      "table", {},
      el("thead", {}, el("tr", {}, ...head, ...terms.map((t) => el("th", { class: "num" }, t)), el("th", { class: "num" }, "Reward"))),
      el("tbody", {}, ...body),
    );
  }

  function drawLaneChips() {
    const stream = current();
    const shown = lanesOf(stream);
    const chips = RESULTS.filter((result) => stream.runs[result.name]).map((result) =>
      el(
        "button",
        {
          class: "chip", type: "button", "aria-pressed": shown.includes(result.name), "data-lane": result.name,
          onclick: () => {
            const lanes = lanesOf(stream);
            state.lanes = lanes.includes(result.name) ? lanes.filter((n) => n !== result.name) : [...lanes, result.name];
            if (!state.lanes.length) state.lanes = [result.name];
            state.lanes = RESULTS.map((r) => r.name).filter((name) => state.lanes.includes(name));
            refreshList(stream);
            drawStream();
            document.querySelector(`[data-lane="${CSS.escape(result.name)}"]`).focus();
          },
        },
        `${result.label} · ${share(stream.runs[result.name].reward)}`,
      ),
    );
    $("lanes").replaceChildren(el("span", { class: "muted small" }, "Show"), ...chips);
  }

  // ---- the overview: tokens in memory over the whole stream ----

  function drawOverview() {
    const stream = current();
    const run = runOf(stream, lanesOf(stream)[0]);
    const count = turnsOf(stream);
    const most = Math.max(1, ...run.turns.map((turn) => turn.live_tokens || 0));
    const chart = svg("svg", { viewBox: `0 0 ${count} 100`, preserveAspectRatio: "none", role: "img" });
    chart.setAttribute("aria-label", `At most ${most} tokens in memory`);
    for (let t = 0; t < count; t += 1) {
      const score = windowAt(stream, t);
      if (score) chart.append(svg("rect", { class: "win", x: t, y: 0, width: 1, height: 100, opacity: 0.08 + 0.2 * score }));
    }
    const area = (top, name) => {
      let path = "M0 100";
      run.turns.forEach((turn, t) => { path += `V${100 - (86 * top(turn)) / most}H${t + 1}`; });
      chart.append(svg("path", { class: name, d: `${path}V100Z` }));
    };
    area((turn) => turn.live_tokens || 0, "text");
    area((turn) => turn.video_tokens || 0, "video");
    const line = (x, name, y1 = 0, y2 = 100) => chart.append(svg("line", { class: name, x1: x, x2: x, y1, y2 }));
    for (const query of stream.queries) if (query.turn < count) line(query.turn + 0.5, "asked");
    run.turns.forEach((turn, t) => { if ("response" in turn) line(t + 0.5, `said ${outcomeAt(run, t)}`, 0, 40); });
    chart.append(svg("rect", { class: "view", id: "view", x: 0, y: 1, width: count, height: 98 }));
    chart.append(svg("line", { class: "now", id: "now", x1: 0, x2: 0, y1: 0, y2: 100 }));
    chart.addEventListener("click", (event) => {
      const box = chart.getBoundingClientRect();
      goTo(Math.floor((count * (event.clientX - box.left)) / box.width));
    });
    const key = (name, text) => el("span", {}, el("i", { class: `key ${name}` }), text);
    $("overview").replaceChildren(
      el("div", { class: "legend" }, el("span", {}, `Tokens in memory, up to ${most.toLocaleString("en")}`), key("video", "video"),
        key("text", "text"), key("window", "answer is worth something"), key("gone", "left memory")),
      chart,
    );
  }

  // ---- the time line ----

  const columnWidth = () => parseFloat(getComputedStyle(document.documentElement).getPropertyValue("--col"));

  function drawTimeline() {
    const stream = current();
    const lanes = lanesOf(stream);
    const rows = [["axis", "turn, time"], ["frame", "video"], ["asked", "question"], ["due", "expected"]];
    for (const name of lanes) {
      rows.push(["lane", labels[name]], ["band", "in memory"], ["thought", "thought"], ["said", "says"], ["bar", "tokens"]);
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
        onpointerenter: () => hover(turn), onpointerleave: () => hover(null),
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
    const now = $("now");
    if (now) for (const x of ["x1", "x2"]) now.setAttribute(x, (state.hover ?? state.turn) + 0.5);
  }

  function hover(turn) {
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

  // ---- one turn ----

  function drawDetail() {
    const stream = current();
    const turn = state.turn;
    const begin = stream.start + turn * stream.chunk_seconds;
    const end = Math.min(begin + stream.chunk_seconds, stream.end);
    const frames = stream.frames[turn] || [];
    const asked = queriesAt(stream, turn);
    const due = dueAt(stream, turn);
    const first = runOf(stream, lanesOf(stream)[0]).turns[turn] || {};
    const seen = el(
      "div", { class: "card" },
      el("h3", {}, "Seen"),
      el("div", { class: "pictures" }, ...frames.map((uri, i) => el("img", { src: uri, alt: `frame ${i + 1} of turn ${turn}` }))),
      first.video
        ? el("p", { class: "small muted" }, `${plural(first.video.tokens, "video token")}, grid ${first.video.grid.join(" × ")}, frames at ${first.video.frame_times.map((t) => t.toFixed(2)).join(", ")} s`)
        : el("p", { class: "small muted" }, "no video in this turn's log"),
      ...asked.map((query) => el("p", { class: "quote" }, el("b", {}, "Question "), query.text)),
      ...due.map((answer) => el("p", { class: "quote" }, el("b", {}, "Due now "), answer.text)),
    );
    $("detail").replaceChildren(
      el("div", { class: "heading" }, el("h2", {}, `Turn ${turn}`), el("span", { class: "muted" }, `${clock(begin)} to ${clock(end)}`)),
      el("div", { class: "cards" }, seen, ...lanesOf(stream).map((name) => laneCard(stream, name, turn))),
    );
  }

  function laneCard(stream, name, turn) {
    const run = runOf(stream, name);
    const entry = run.turns[turn];
    const card = el("div", { class: "card", "data-card": name }, el("h3", {}, labels[name]));
    if (!entry) {
      card.append(el("p", { class: "muted" }, "this stream had ended"));
      return card;
    }
    const spoke = "response" in entry;
    card.append(
      el("p", { class: "quote thought" }, entry.thought || el("span", { class: "muted" }, "no thought")),
      spoke ? el("p", { class: "quote" }, el("b", {}, "Says "), entry.response || "(empty)") : el("p", { class: "muted" }, "Stays silent."),
    );
    const answer = answerAt(run, turn);
    if (answer) {
      const parts = Object.entries(answer.components).map(([term, value]) => `${term} ${share(value)}`).join(", ");
      const expected = stream.answers[answer.index];
      card.append(el("p", {}, el("span", { class: `tag ${answer.outcome}` }, `${SIGN[answer.outcome]} ${answer.outcome}`),
        ` expected ${expected.text} in turn ${expected.due_turn}; reward ${share(answer.value)}${parts ? ` (${parts})` : ""}`));
    } else if (spoke) card.append(el("p", {}, el("span", { class: "tag spare" }, "answers nothing that was expected")));
    if (!entry.well_formed) card.append(el("p", {}, el("span", { class: "tag wrong" }, "not well-formed")));
    if (entry.live_tokens) card.append(...memoryOf(run, entry, turn));
    return card;
  }

  function memoryOf(run, entry, turn) {
    const kinds = Object.entries(entry.live);
    const chunks = run.turns.flatMap((t, i) => (t.video && liveAt(t.video.live, turn) ? [i] : []));
    const texts = run.turns.flatMap((t, i) => (liveAt(t.text_live, turn) ? [i] : []));
    const fact = (name, value) => [el("dt", {}, name), el("dd", {}, value)];
    return [
      el("div", { class: "stack" }, ...kinds.map(([kind, n]) => el("i", { class: `k-${kind}`, title: `${kind} ${n}`, style: { width: `${(100 * n) / entry.live_tokens}%` } }))),
      el("div", { class: "kinds" }, ...kinds.map(([kind, n]) => el("span", {}, el("i", { class: `key k-${kind}` }), `${kind} ${n}`))),
      el(
        "dl", { class: "facts" },
        ...fact("in memory", `${plural(entry.live_tokens, "token")}: ${entry.video_tokens} video, ${entry.text_tokens} text`),
        ...fact("video of turns", chunks.length ? `${spans(chunks)} (${chunks.length})` : "none"),
        ...fact("text of turns", texts.length ? `${spans(texts)} (${texts.length})` : "none"),
        ...fact("evicted", `${plural(entry.evicted_tokens || 0, "token")} in this turn`),
        ...fact("this turn", `${plural(entry.tokens, "token")}, ${entry.new_tokens || 0} generated, ${entry.think_tokens || 0} of thought`),
      ),
    ];
  }

  // ---- start ----

  function remember() {
    history.replaceState(null, "", `#${encodeURIComponent(current().task)}/${state.turn}`);
  }

  function onKey(event) {
    const typing = event.target === $("search");
    if (event.altKey || event.ctrlKey || event.metaKey || event.target.tagName === "SELECT") return;
    if (event.key === "/" && !typing) $("search").focus();
    else if (event.key === "Escape" && typing) { $("search").value = ""; refreshList(current()); $("list").focus(); }
    else if (!state.list.length) return;
    else if (event.key === "ArrowDown") select(state.index + 1);
    else if (event.key === "ArrowUp") select(state.index - 1);
    else if (event.key === "ArrowRight" && !typing) goTo(state.turn + 1);
    else if (event.key === "ArrowLeft" && !typing) goTo(state.turn - 1);
    else return;
    event.preventDefault();
  }

  const about = RESULTS.map((r) => `${r.label}${r.streams === null ? "" : `: ${r.questions} questions in ${plural(r.streams, "stream")}, mean reward ${share(r.reward)}`}`);
  $("about").textContent = [`${STREAMS.length} streams shown`, ...about, ...DATA.notes].join(" · ");
  const categories = [...new Set(STREAMS.map((stream) => stream.category))].sort();
  $("category").append(el("option", { value: "" }, "all"), ...categories.map((name) => el("option", { value: name }, name)));
  $("search").addEventListener("input", () => refreshList(current()));
  for (const id of ["category", "sort"]) $(id).addEventListener("change", () => refreshList(current()));
  $("scroll").addEventListener("scroll", () => requestAnimationFrame(drawColumns), { passive: true });
  window.addEventListener("resize", () => { if (current()) drawTimeline(), scrollToTurn(); });
  document.addEventListener("keydown", onKey);
  const [task, turn] = location.hash.slice(1).split("/");
  const linked = STREAMS.find((stream) => encodeURIComponent(stream.task) === task);
  refreshList(null);
  if (linked) select(state.list.indexOf(linked), Number(turn) || 0);
  $("list").focus({ preventScroll: true });
})();
