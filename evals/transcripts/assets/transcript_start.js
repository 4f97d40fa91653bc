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

const measured = RESULTS.filter((r) => r.streams !== null);
const stats = measured.map((r) => el("span", { class: "stat" }, `${r.label} `, el("b", {}, share(r.reward)),
  ` (${plural(r.streams, "stream")})`));
$("about").append(el("span", { class: "stat" }, `${plural(STREAMS.length, "stream")} shown`), measured.length ? "Mean reward" : "", ...stats);
for (const note of DATA.notes) $("about").append(el("span", { class: "note" }, note));
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
