// The flow view: what is shown, what the reader does, and the frame. Nodes are in flow_nodes.js. Edges (flow_edges.js) are on two canvases: all
// shown edges below, and those under attention above, so that pointing redraws a few curves and not thousands. The layout always fits.
(() => {
  "use strict";
  const DRAFT = 600; // edges drawn while the slider moves; the weaker ones, all faint, follow when it rests
  const LABELLED = 40; // names of nodes
  const { place, edgesOf, marksOf, element, button, signOf, short, number, reads, nodePanel, overviewPanel, svgElement, save } = lensRelevance.flow;

  lensRelevance.define("Flow", (body, data) => {
    const { nodes, edges } = data;
    const strongest = edges.reduce((most, e) => Math.max(most, Math.abs(e[2])), 0) || 1;
    const incident = nodes.map(() => []);
    edges.forEach(([source, target], i) => { incident[source].push(i); if (target !== source) incident[target].push(i); });
    const state = { shown: data.shown, pinned: new Set(), selected: new Set(), groups: [], path: null };
    let opened = null, focus = null, found = null; // a node; edges under attention; nodes that the search found
    let drawn = [], shownGrid = "";
    const view = { data, incident, strongest, state, width: 0, height: 0, layout: null, zoomed: { k: 1, x: 0, y: 0 } };

    const where = (node) => `“${data.tokens[node.position]}” (${node.position})`;
    const share = (score) => (data.targetValue && score !== null ? `${number((100 * score) / data.targetValue, false)} % of ${data.target}` : "");
    const patched = (node) => node.interval ? [`patched: ${number(node.interval[0])} to ${number(node.interval[1])}${node.interval[2] ? "" : ", unsure"}`] : [];
    const scoreLine = (score) => (score === null ? "no score of its own" : [number(score), share(score)].filter(Boolean).join(" · "));
    const groupOf = (i) => state.groups.find((group) => group.members.includes(i));
    const shownAs = (i) => groupOf(i)?.head ?? i; // a group stands where its strongest member does
    const nameOf = (i) => groupOf(i)?.name ?? nodes[i].name;
    const ends = (e) => [shownAs(edges[e][0]), shownAs(edges[e][1]), edges[e][2]];

    // ---- the frame
    const slider = element("input", { type: "range", min: 0, max: 1000, step: 1 });
    const count = element("output", { className: "lr-flow-count" });
    const names = [...new Set(nodes.map((node) => node.name))];
    const search = element("input", { type: "search", placeholder: "L3H5", autocomplete: "off", spellcheck: false });
    const hits = element("output", { className: "lr-flow-hits" });
    hits.setAttribute("aria-live", "polite");
    const file = (kind) => button(kind.toUpperCase(), `save as ${kind.toUpperCase()}`, async () => (root.dataset.saved = `${kind} ${await save(view, kind)}`));
    const bar = element("div", { className: "lr-flow-bar" },
      element("label", {}, "Edges", slider, count), element("label", {}, "Find", search, hits),
      element("span", { className: "lr-flow-buttons" },
        button("−", "smaller", () => zoomBy(1 / 1.25)), button("+", "larger", () => zoomBy(1.25)), button("Fit", "show all of it", () => fit()),
        file("svg"), file("png"), file("json")));
    const base = element("canvas", { className: "lr-flow-base" }), above = element("canvas", { className: "lr-flow-above" });
    const picture = svgElement("svg", { role: "group", "aria-label": `${data.title}: nodes` });
    const ground = svgElement("g"), moving = svgElement("g");
    moving.append(ground);
    picture.append(moving);
    const rows = element("div", { className: "lr-flow-rows" }), tokens = element("div", { className: "lr-flow-tokens" });
    const overview = element("canvas", { className: "lr-flow-overview", width: 150, height: 100, hidden: true });
    overview.setAttribute("aria-label", "overview; click to move there");
    const stage = element("div", { className: "lr-flow-stage" }, base, above, picture, rows, tokens, overview);
    const panel = element("aside", { className: "lr-flow-panel" });
    panel.setAttribute("aria-label", "strongest paths, or the opened node");
    const legend = element("p", { className: "lr-flow-legend" });
    const contributions = data.info?.kind === "contribution";
    const signs = contributions ? [["lr-pos", `part of ${data.target}`]] : [["lr-pos", `for ${data.target}`], ["lr-neg", "against it"]];
    for (const [sign, text] of signs) legend.append(element("span", {}, element("i", { className: sign }), text));
    const ofDictionaries = nodes.some((node) => node.kind.endsWith("error")) ? "  ⬢ feature  ▼ missed by a dictionary" : "";
    const ofStates = nodes.some((node) => node.kind.endsWith("stream")) ? "  ▬ residual stream" : "";
    legend.append(element("span", { textContent: `◆ embedding  ● head  ○ head, where it reads  ■ MLP${ofStates}${ofDictionaries}  ▲ logits; q, k, v: by query, key or value; the larger, the more ${contributions ? "flows through" : "relevance"}` }));
    if (data.dropped) legend.append(element("span", { textContent: `${data.dropped.toLocaleString("en")} weaker edges are not in this page` }));
    const root = element("div", { className: "lr-flow" }, bar, element("div", { className: "lr-flow-main" }, stage, panel), legend);
    lensRelevance.keepForPaper(body);
    body.prepend(root);

    Object.assign(view, { where, scoreLine, patched, groupOf, nameOf, ends });
    const painted = edgesOf(view, root);
    const { marks, put } = marksOf(view, moving, {
      pointerenter: (i) => lookAtNode(i), pointerleave: () => lookAtNode(null), focus: (i) => lookAtNode(i, true), blur: () => lookAtNode(null),
      click: (i, event) => (event.shiftKey ? select(i) : open(i)),
    });

    // ---- what is shown, and where
    const shownEdges = () => {
      const list = [];
      for (let i = Math.min(state.shown, edges.length) - 1; i >= 0; i -= 1) {
        const [s, t] = ends(i);
        if (s !== t && (!found || found.has(edges[i][0]) || found.has(edges[i][1]))) list.push(i);
      }
      return list; // strongest last: they are drawn on top
    };
    function labelled() {
      const always = new Set([...state.pinned, ...state.groups.map((g) => g.head), ...(state.path === null ? [] : data.paths[state.path].nodes), ...(opened === null ? [] : [opened])].map(shownAs));
      const ranked = drawn.filter((i) => nodes[i].layer !== null && nodes[i].score !== null).sort((a, b) => always.has(b) - always.has(a) || Math.abs(nodes[b].score) - Math.abs(nodes[a].score));
      const taken = [], named = [];
      for (const i of ranked.slice(0, LABELLED)) {
        const at = view.layout.marks.get(i), half = 3.3 * nameOf(i).length;
        if (!always.has(i) && taken.some(([x, y, w]) => Math.abs(at.x - x) < half + w && Math.abs(at.y - at.r - y) < 11)) continue;
        taken.push([at.x, at.y - at.r, half]);
        named.push(i);
      }
      return named;
    }
    function measure() {
      view.width = Math.max(stage.clientWidth, 240);
      view.outer = stageHeight();
      stage.style.height = `${view.outer}px`;
      view.height = stage.clientHeight;
      panel.style.maxHeight = window.innerWidth > 760 ? `${view.outer}px` : "";
    }
    function layOut() {
      const list = new Set([...state.pinned].map(shownAs));
      for (let i = 0; i < state.shown; i += 1) ends(i).slice(0, 2).forEach((node) => list.add(node));
      if (!edges.length) nodes.forEach((_, i) => list.add(shownAs(i)));
      drawn = [...list].sort((a, b) => a - b);
      view.layout = place(nodes, drawn, data.labels, view.width, view.height);
      painted.moved();
      const { layout } = view;
      const grid = JSON.stringify([layout.columns, layout.rows, view.width, view.height]);
      if (grid !== shownGrid) layOutGrid();
      shownGrid = grid;
      put(drawn, new Set(labelled()));
      if (!drawn.some((i) => marks[i].getAttribute("tabindex") === "0") && drawn.length) rove(drawn[0]);
      root.dataset.nodes = drawn.length;
      move(view.zoomed);
    }
    // Lines behind the nodes, names of rows and tokens.
    function layOutGrid() {
      const { layout } = view;
      ground.replaceChildren(
        ...layout.columns.filter((c) => c.count === 1).map((c) => svgElement("line", { class: "lr-column", x1: c.centre, x2: c.centre, y1: 14, y2: view.height - 26 })),
        ...layout.rows.map((row) => svgElement("line", { class: "lr-band", x1: 70, x2: view.width - 8, y1: row.y, y2: row.y })));
      tokens.replaceChildren(...layout.columns.map((c) => {
        const all = data.tokens.slice(c.position, c.position + c.count);
        return element("span", { textContent: c.count === 1 ? short(data.labels[c.position]) : "…", title: `${c.position}${c.count > 1 ? `–${c.position + c.count - 1}` : ""}: ${all.join("")}` });
      }));
      // Names of rows that would overlap are left out, the first and last excepted.
      const every = Math.max(1, Math.ceil(12 / layout.step));
      rows.replaceChildren(...layout.rows.map((row, n) => element("span", { textContent: row.name, hidden: n % every !== 0 && n !== layout.rows.length - 1 })));
    }
    // The picture fills the window below the page's head; further down a long page it takes most of the window.
    function stageHeight() {
      const top = stage.getBoundingClientRect().top + window.scrollY;
      const rest = window.innerHeight - top - legend.offsetHeight - 22;
      return Math.round(top < 0.5 * window.innerHeight ? Math.max(rest, 400) : Math.min(Math.max(0.8 * window.innerHeight, 400), 900));
    }
    // ---- drawing
    function drawAll(limit = Infinity) {
      const list = shownEdges(), part = list.slice(Math.max(0, list.length - limit));
      if (limit === Infinity) painted.readColours();
      painted.paint(base, part, false);
      drawAttention();
      root.dataset.drawn = part.length;
    }
    function drawAttention(node = null) {
      const looked = node ?? opened;
      const members = looked === null ? [] : groupOf(looked)?.members ?? [looked];
      const chosen = state.path === null ? [] : data.paths[state.path].edges;
      const near = members.flatMap((i) => incident[i]).filter((i) => i < state.shown);
      const list = focus ?? (looked !== null ? [...new Set(near)].reverse() : chosen);
      painted.paint(above, list, true);
      base.style.opacity = list.length ? 0.25 : 1;
      root.dataset.highlighted = list.length;
    }
    let asked = false, rest = 0;
    function redrawSoon(layout) {
      redrawSoon.layout ||= layout;
      if (asked) return;
      asked = true;
      requestAnimationFrame(() => {
        asked = false;
        if (redrawSoon.layout) layOut();
        redrawSoon.layout = false;
        drawAll(DRAFT);
        clearTimeout(rest);
        if (state.shown > DRAFT) rest = setTimeout(drawAll, 150);
      });
    }

    // ---- attention: pointer and focus
    function look(list) { focus = list; drawAttention(); }
    function lookAtNode(i, focused = false) {
      focus = null;
      drawAttention(i);
      if (i === null) return lensRelevance.hideTip();
      const box = marks[i].getBoundingClientRect();
      lensRelevance.showTip([nameOf(i), `at ${where(nodes[i])}`, scoreLine(nodes[i].score), ...patched(nodes[i])], focused ? box.right : box.left + box.width / 2, box.bottom - 8);
    }
    function lookAtEdge(event) {
      if (event.target.closest?.(".lr-node") || dragging) return;
      const frame = picture.getBoundingClientRect();
      const i = painted.nearest(shownEdges(), (event.clientX - frame.left - view.zoomed.x) / view.zoomed.k, (event.clientY - frame.top - view.zoomed.y) / view.zoomed.k);
      if ((focus?.[0] ?? null) !== i) look(i === null ? null : [i]);
      if (i === null) return lensRelevance.hideTip();
      const edge = edges[i];
      const lines = [`${nodes[edge[0]].name} → ${reads(nodes, edge)}`, `from ${where(nodes[edge[0]])}`, `to ${where(nodes[edge[1]])}`, scoreLine(edge[2])];
      lensRelevance.showTip(lines, event.clientX, event.clientY);
    }
    // ---- opening, pinning, grouping, paths
    function fillPanel() {
      panel.dataset.node = opened === null ? "" : nodes[opened].name;
      panel.replaceChildren(...(opened === null ? overviewPanel(view) : nodePanel(view, opened)));
      panel.scrollTop = 0;
    }
    function open(i, focused = false) {
      const was = opened;
      if (was !== null) marks[was].classList.remove("lr-open");
      opened = i === null ? null : shownAs(i);
      if (opened !== null) {
        if (!drawn.includes(opened)) { state.pinned.add(opened); changed(); } // hidden by the slider: asked for, so shown
        marks[opened].classList.add("lr-open");
        rove(opened);
      }
      fillPanel();
      focus = null;
      drawAttention();
      const at = opened ?? was;
      if (focused && at !== null && drawn.includes(at)) { marks[at].focus({ preventScroll: true }); reveal(at); }
    }
    function changed() { layOut(); drawAll(); remember(); }
    function pin(i) { if (!state.pinned.delete(i)) state.pinned.add(i); changed(); fillPanel(); }
    function select(i) { if (!state.selected.delete(i)) state.selected.add(i); opened = null; changed(); fillPanel(); }
    function group(name) {
      const members = [...state.selected].flatMap((i) => groupOf(i)?.members ?? [i]);
      const head = members.reduce((best, i) => (Math.abs(nodes[i].score ?? 0) > Math.abs(nodes[best].score ?? 0) ? i : best));
      state.groups = state.groups.filter((g) => !members.includes(g.head));
      state.groups.push({ name: name.trim() || `group ${state.groups.length + 1}`, members, head });
      state.selected.clear();
      changed();
      fillPanel();
    }
    function ungroup(which) { state.groups = state.groups.filter((g) => g !== which); open(null); changed(); }
    function choosePath(n) {
      state.path = n;
      if (n !== null) setShown(Math.max(state.shown, ...data.paths[n].edges.map((e) => e + 1)));
      open(null);
      changed();
      fillPanel();
    }
    const savedState = () => ({ shown: state.shown, pinned: [...state.pinned], groups: state.groups.map(({ name, members }) => ({ name, members })), path: state.path });
    function remember() { // in the page's address, so that a reload or a saved link brings it back
      if (document.querySelectorAll(".lr-flow").length !== 1 || !document.querySelector(".lr-page")) return;
      try { history.replaceState(null, "", `#flow=${encodeURIComponent(JSON.stringify(savedState()))}`); } catch { /* a page without an address */ }
    }
    function recall() {
      const text = /^#flow=(.*)$/.exec(window.location.hash)?.[1];
      if (!text) return;
      try {
        const kept = JSON.parse(decodeURIComponent(text)), valid = (i) => Number.isInteger(i) && i >= 0 && i < nodes.length;
        for (const i of kept.pinned.filter(valid)) state.pinned.add(i);
        for (const { name, members } of kept.groups) if (members.length > 1 && members.every(valid)) { members.forEach((i) => state.selected.add(i)); group(String(name)); }
        if (Number.isInteger(kept.shown)) setShown(kept.shown);
        if (data.paths[kept.path]) state.path = kept.path;
      } catch { /* an address of another page */ }
    }
    Object.assign(view, { open, look, pin, group, ungroup, choosePath, shownEdges, labelled, savedState });

    // ---- slider and search
    const toSlider = (n) => (edges.length > 1 ? Math.round((1000 * Math.log(Math.max(n, 1))) / Math.log(edges.length)) : 1000);
    function setShown(n) {
      n = data.whole.find((count) => count >= n) ?? edges.length; // so that each edge shown lies on a path that is drawn whole
      state.shown = n;
      count.textContent = `${n.toLocaleString("en")} of ${edges.length.toLocaleString("en")}`;
      slider.setAttribute("aria-valuetext", count.textContent);
      if (document.activeElement !== slider) slider.value = toSlider(n);
      root.dataset.shown = n;
    }
    slider.setAttribute("aria-label", "how many of the strongest edges are shown");
    slider.addEventListener("input", () => { setShown(Math.round(edges.length ** (slider.value / 1000))); redrawSoon(true); });
    slider.addEventListener("change", remember);
    search.setAttribute("aria-label", "find a component");
    function match() {
      const wanted = search.value.trim().toLowerCase();
      const exact = names.some((name) => name.toLowerCase() === wanted);
      const fits = (name) => (exact ? name === wanted : name.startsWith(wanted));
      found = wanted ? new Set(nodes.flatMap((node, i) => (fits(node.name.toLowerCase()) ? [i] : []))) : null;
      hits.textContent = !found ? "" : found.size ? `${found.size} ${found.size === 1 ? "node" : "nodes"}` : "none";
      marks.forEach((mark, i) => mark.classList.toggle("lr-faint", Boolean(found) && !found.has(i)));
      redrawSoon(false);
    }
    search.addEventListener("input", match);
    search.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && search.value) { search.value = ""; match(); event.stopPropagation(); }
      if (event.key !== "Enter" || !found?.size) return;
      open([...found].sort((a, b) => Math.abs(nodes[b].score ?? 0) - Math.abs(nodes[a].score ?? 0))[0], true);
    });

    // ---- keys
    root.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && opened !== null) open(null, true);
      if (event.key === "/" && event.target.tagName !== "INPUT") { event.preventDefault(); search.focus(); }
    });
    function rove(i) {
      marks.forEach((mark) => mark.getAttribute("tabindex") === "0" && mark.setAttribute("tabindex", -1));
      marks[i].setAttribute("tabindex", 0);
    }
    picture.addEventListener("keydown", (event) => {
      const i = marks.indexOf(event.target);
      if (i < 0) return;
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); if (event.shiftKey) select(i); else open(i, true); }
      const step = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] }[event.key];
      if (!step) return;
      event.preventDefault();
      // The nearest node in that direction, where being off to the side counts three times.
      const from = view.layout.marks.get(i);
      let best = null, nearest = Infinity;
      for (const j of drawn) {
        const at = view.layout.marks.get(j), along = (at.x - from.x) * step[0] + (at.y - from.y) * step[1];
        const aside = Math.abs((at.x - from.x) * step[1]) + Math.abs((at.y - from.y) * step[0]);
        if (along > 1 && along + 3 * aside < nearest) { nearest = along + 3 * aside; best = j; }
      }
      if (best === null) return;
      rove(best);
      marks[best].focus({ preventScroll: true });
      reveal(best);
    });

    // ---- zoom: wheel, pinch, buttons; drag; overview
    function move(to) {
      const k = Math.min(Math.max(to.k, 1), 12);
      const within = (value, size) => Math.min(0, Math.max(value, size * (1 - k))); // the picture never leaves its frame
      view.zoomed = { k, x: within(to.x, view.width), y: within(to.y, view.height) };
      moving.setAttribute("transform", `translate(${view.zoomed.x} ${view.zoomed.y}) scale(${k})`);
      view.layout.rows.forEach((row, n) => (rows.children[n].style.top = `${row.y * k + view.zoomed.y}px`));
      view.layout.columns.forEach((c, n) => (tokens.children[n].style.left = `${c.centre * k + view.zoomed.x}px`));
      root.dataset.zoom = k.toFixed(3);
      overview.hidden = k < 1.05;
      if (!overview.hidden) painted.paintOverview(overview, drawn);
    }
    function zoomAt(factor, x, y) {
      const k = Math.min(Math.max(view.zoomed.k * factor, 1), 12), by = k / view.zoomed.k;
      move({ k, x: x - (x - view.zoomed.x) * by, y: y - (y - view.zoomed.y) * by });
      redrawSoon(false);
    }
    const zoomBy = (factor) => zoomAt(factor, view.width / 2, view.height / 2);
    function fit() { view.zoomed = { k: 1, x: 0, y: 0 }; measure(); layOut(); drawAll(); }
    function reveal(i) {
      const at = view.layout.marks.get(i), x = at.x * view.zoomed.k + view.zoomed.x, y = at.y * view.zoomed.k + view.zoomed.y;
      if (x > 60 && x < view.width - 10 && y > 10 && y < view.height - 30) return;
      move({ k: view.zoomed.k, x: view.width / 2 - at.x * view.zoomed.k, y: view.height / 2 - at.y * view.zoomed.k });
      drawAll();
    }
    const alone = () => Boolean(document.querySelector(".lr-page")) && !document.querySelector(".lr-page h2");
    stage.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !alone()) return; // on a long page the wheel scrolls, and with Ctrl it zooms
      event.preventDefault();
      const frame = stage.getBoundingClientRect();
      zoomAt(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)), event.clientX - frame.left, event.clientY - frame.top);
    }, { passive: false });
    const touching = new Map();
    let dragging = false, pending = null;
    picture.addEventListener("pointerdown", (event) => {
      if (event.target.closest(".lr-node")) return;
      touching.set(event.pointerId, event);
      picture.setPointerCapture(event.pointerId);
    });
    picture.addEventListener("pointermove", (event) => {
      const last = touching.get(event.pointerId);
      if (!last) {
        if (!pending) requestAnimationFrame(() => { lookAtEdge(pending); pending = null; });
        pending = event;
        return;
      }
      const others = [...touching.values()].filter((e) => e.pointerId !== event.pointerId);
      if (others.length) {
        const frame = stage.getBoundingClientRect(), far = (a, b) => Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY);
        zoomAt(far(event, others[0]) / Math.max(far(last, others[0]), 1), (event.clientX + others[0].clientX) / 2 - frame.left, (event.clientY + others[0].clientY) / 2 - frame.top);
      } else if (view.zoomed.k > 1) {
        dragging = true;
        lensRelevance.hideTip();
        move({ k: view.zoomed.k, x: view.zoomed.x + event.clientX - last.clientX, y: view.zoomed.y + event.clientY - last.clientY });
        redrawSoon(false);
      }
      touching.set(event.pointerId, event);
    });
    for (const end of ["pointerup", "pointercancel"]) picture.addEventListener(end, (event) => { touching.delete(event.pointerId); dragging = false; });
    picture.addEventListener("pointerleave", () => { look(null); lensRelevance.hideTip(); });
    overview.addEventListener("click", (event) => {
      const box = overview.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * view.width, y = ((event.clientY - box.top) / box.height) * view.height;
      move({ k: view.zoomed.k, x: view.width / 2 - x * view.zoomed.k, y: view.height / 2 - y * view.zoomed.k });
      drawAll();
    });

    setShown(state.shown);
    fillPanel();
    recall();
    fit();
    fillPanel();
    new ResizeObserver(() => { if (stage.clientWidth && stage.clientWidth !== view.width) fit(); }).observe(stage);
    window.addEventListener("resize", () => stageHeight() !== view.outer && fit());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawAll());
  });
})();
