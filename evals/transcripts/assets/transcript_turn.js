// ---- one turn ----

function drawDetail() {
  const stream = current();
  const turn = state.turn;
  const begin = stream.start + turn * stream.chunk_seconds;
  const end = Math.min(begin + stream.chunk_seconds, stream.end ?? Infinity); // null: the row names no end
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
