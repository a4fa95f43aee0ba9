// The index of the sidecar's page: the runs that it knows, asked for again every two seconds.
// Whatever comes from a run reaches the page as text (textContent), never as markup.
"use strict";
(() => {
  const EVERY_MS = 2000, MOST = 8;
  const marked = new Set();

  function ago(seconds) {
    if (seconds < 10) return "now";
    if (seconds < 120) return `${Math.round(seconds)} s ago`;
    const minutes = Math.floor(seconds / 60), hours = Math.floor(minutes / 60);
    return hours >= 48 ? `${Math.floor(hours / 24)} days ago` : hours ? `${hours} h ${minutes % 60} min ago` : `${minutes} min ago`;
  }

  const SVG = "http://www.w3.org/2000/svg";
  function spark(values) {
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", "0 0 100 24"); svg.setAttribute("width", "100"); svg.setAttribute("height", "24");
    svg.setAttribute("role", "img"); svg.setAttribute("aria-label", "Loss over its steps");
    if (values.length > 1) {
      const low = Math.min(...values), size = Math.max(...values) - low || 1;
      const line = document.createElementNS(SVG, "polyline");
      line.setAttribute("points", values.map((value, i) => `${(100 * i / (values.length - 1)).toFixed(1)},${(22 - 20 * (value - low) / size).toFixed(1)}`).join(" "));
      line.setAttribute("fill", "none"); line.setAttribute("stroke", "currentColor"); line.setAttribute("stroke-width", "1.5");
      svg.append(line);
    }
    return svg;
  }

  const stateOf = run => run.ended ? `ended: ${shown(run.ended)}` : run.stale ? "stale" : "training";

  function compare() {
    $("over").disabled = marked.size < 2;
  }

  let drawn = "";
  function draw(told) {
    $("made").textContent = [told.table ? `Table ${shown(told.table)}` : "", told.uptime_s ? `serving for ${ago(told.uptime_s + 10).replace(" ago", "")}` : ""].filter(Boolean).join(", ");
    $("problems").replaceChildren(...(told.problems.length ? [h("ul", {}, told.problems.map(text => h("li", {}, shown(text))))] : []));
    const known = new Set(told.runs.map(run => run.id));
    for (const id of marked) if (!known.has(id)) marked.delete(id);
    const now = JSON.stringify(told.runs.map(run => ({...run, heard_s: ago(run.heard_s)})));
    if (now === drawn) return;
    drawn = now;
    const focused = document.activeElement && document.activeElement.dataset.of;
    const head = ["run", "ranks", "last step", "loss", "", "decisions", "state", "heard of"];
    const rows = told.runs.map(run => h("tr", {"data-run": run.id},
      h("th", {scope: "row"},
        h("input", {type: "checkbox", checked: marked.has(run.id), "data-of": `mark ${run.id}`, "aria-label": `Mark ${shown(run.name)}`,
          onchange: event => {
            if (event.target.checked && marked.size < MOST) marked.add(run.id); else { marked.delete(run.id); event.target.checked = false; }
            compare();
          }}), " ",
        h("a", {href: `/runs/${run.id}`, "data-of": run.id}, h("bdi", {}, shown(run.name)))),
      h("td", {}, number(run.ranks)), h("td", {}, number(run.steps)),
      h("td", {}, run.loss ? `${brief(run.loss[0])} → ${brief(run.loss[1])}` : "–"), h("td", {}, spark(run.spark)),
      h("td", {}, number(run.decisions)), h("td", {class: "words"}, stateOf(run)), h("td", {}, ago(run.heard_s))));
    $("runs").replaceChildren(told.runs.length
      ? h("table", {}, h("thead", {}, h("tr", {}, head.map((word, i) => h("th", {class: i ? null : "words", scope: "col"}, word)))), h("tbody", {}, rows))
      : h("p", {class: "faint"}, "No run yet. This page shows one as soon as Tamiyo has judged a step of it."));
    if (focused) { const again = [...document.querySelectorAll("[data-of]")].find(one => one.dataset.of === focused); if (again) again.focus(); }
    compare();
  }

  let failures = 0;
  async function look() {
    if (!document.hidden) {
      try {
        const response = await fetch("/runs.json");
        if (!response.ok) throw new Error(`the sidecar answers ${response.status}`);
        draw(await response.json());
        failures = 0;
        document.documentElement.dataset.ready = "yes";
      } catch (error) {
        failures += 1;
        drawn = "";
        $("problems").replaceChildren(h("p", {}, `No answer from the sidecar (${shown(error.message)}): what is shown is not news.`));
      }
    }
    setTimeout(look, EVERY_MS * Math.min(2 ** failures, 8));
  }
  $("over").addEventListener("click", () => { location.href = `/runs/${[...marked].join(",")}`; });
  document.addEventListener("visibilitychange", () => { if (!document.hidden) drawn = ""; });
  look();
})();
