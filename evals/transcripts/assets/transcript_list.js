// ---- the list ----

function refreshList(keep) {
  const wanted = $("search").value.trim().toLowerCase();
  const category = $("category").value;
  const inCategory = STREAMS.filter((stream) => !category || stream.category === category);
  const found = inCategory.filter((stream) => !wanted || stream.haystack.includes(wanted));
  const counts = Object.fromEntries(OUTCOMES.map((name) => [name, 0]));
  for (const stream of found) for (const name of outcomesOf(stream)) counts[name] += 1;
  drawOutcomes(counts);
  const list = found.filter(
    (stream) => !state.outcomes.size || outcomesOf(stream).some((name) => state.outcomes.has(name)),
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
      ...lanesOf(stream).flatMap((name) => outcomeTags(stream.runs[name], labels[name])),
      run.failed ? el("span", { class: "tag wrong" }, "could not run") : "",
      Math.abs(delta) > 1e-9 && RESULTS.length > 1
        ? el("span", { class: "muted", title: `${labels[RESULTS[0].name]} against ${labels[RESULTS[1].name]}` },
            `${delta > 0 ? "+" : "−"}${share(Math.abs(delta))}`)
        : "",
    ),
  );
}

function outcomeTags(run, label) {
  const counts = new Map();
  for (const { outcome } of run.answers) counts.set(outcome, (counts.get(outcome) || 0) + 1);
  return [...counts].map(([outcome, n]) =>
    el("span", { class: `tag ${outcome}`, title: label }, `${SIGN[outcome]} ${outcome}${n > 1 ? ` ${n}` : ""}`));
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
