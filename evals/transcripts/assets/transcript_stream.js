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
  const { name: memory, ...knobs } = run.policy || {};
  const set = Object.entries(knobs).filter(([, value]) => value).map(([knob, value]) => `, ${knob.replaceAll("_", " ")} ${value}`);
  const policy = memory && memory + set.join("");
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
              el("td", { rowspan: count, title: `kind: ${answer.kind}` }, el("b", {}, answer.text)),
              el("td", { class: "line", rowspan: count }, `turn ${answer.due_turn}, ${clock(answer.time)}`),
            ]
          : []),
        el("td", { class: "line" }, labels[name]),
        el("td", { class: "wide" }, spoke ? got.response || "(empty)" : el("span", { class: "muted" }, "none")),
        el("td", { class: "line" }, spoke ? `turn ${got.response_turn}${late ? ` (${late > 0 ? "+" : "−"}${Math.abs(late)})` : ""}` : "–"),
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
