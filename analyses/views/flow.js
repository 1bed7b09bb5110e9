// The flow view. Nodes are SVG (they take focus, clicks and names); edges are drawn on two canvases: all shown edges below, and those of the node
// or edge under attention above, so that hovering redraws a few curves and not thousands.
(() => {
  "use strict";
  const SVG = "http://www.w3.org/2000/svg";
  const FILLS = { "lr-pos": "#2166ac", "lr-neg": "#b2182b" };
  const MAX_PIXELS = 16e6; // phones refuse larger canvases
  const LISTED = 40; // edges of each direction in an opened node
  const DRAFT = 1200; // edges drawn while the slider moves; the weaker ones, all faint, follow when it rests

  const element = (tag, props = {}, ...children) => {
    const made = Object.assign(document.createElement(tag), props);
    made.append(...children);
    return made;
  };
  const svgElement = (tag, attributes = {}, text) => {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const signOf = (score) => (score < 0 ? "lr-neg" : "lr-pos");
  const short = (label) => (label.length <= 11 ? label : label.slice(0, 10) + "…");
  function number(value, signed = true) {
    if (value === null || value === undefined) return "–";
    if (value === 0) return "0";
    const size = Math.abs(value);
    const decimals = Math.min(Math.max(3 - Math.ceil(Math.log10(size) + 1e-12), 0), 8);
    const text = size < 1e-4 ? size.toExponential(1).replace("-", "−") : size.toLocaleString("en", { minimumFractionDigits: decimals, maximumFractionDigits: decimals });
    return (value < 0 ? "−" : signed ? "+" : "") + text;
  }

  lensRelevance.define("Flow", (body, data) => {
    const { nodes, edges } = data;
    const strongest = edges.length ? Math.abs(edges[0][2]) || 1 : 1;
    const incident = nodes.map(() => []);
    edges.forEach(([source, target], i) => {
      incident[source].push(i);
      if (target !== source) incident[target].push(i);
    });
    const curves = edges.map(([s, t]) => curve(nodes[s], nodes[t]));
    let shown = data.shown;
    let scale = 1;
    let opened = null; // node index
    let focusEdge = null;
    let found = null; // Set of node indices while a search is on

    const where = (node) => `“${data.tokens[node.position]}” (${node.position})`;
    const share = (score) =>
      data.targetValue && score !== null ? `${number((100 * score) / data.targetValue, false)} % of ${data.target}` : "";
    const scoreLine = (score) => (score === null ? "no score of its own" : [number(score), share(score)].filter(Boolean).join(" · "));
    const reads = (edge) => nodes[edge[1]].name + (edge[3] ? "." + edge[3] : "");

    // ---- the frame
    const slider = element("input", { type: "range", min: 0, max: 1000, step: 1, value: position(shown) });
    const count = element("output", { className: "lr-flow-count" });
    const names = [...new Set(nodes.map((node) => node.name))];
    const search = element("input", { type: "search", placeholder: "L3H5", autocomplete: "off", spellcheck: false });
    const hits = element("output", { className: "lr-flow-hits" });
    hits.setAttribute("aria-live", "polite");
    const button = (text, label, run) => {
      const made = element("button", { type: "button", textContent: text, title: label, onclick: run });
      made.setAttribute("aria-label", label);
      return made;
    };
    const bar = element("div", { className: "lr-flow-bar" },
      element("label", {}, "Edges", slider, count),
      element("label", {}, "Find", search, hits),
      element("span", { className: "lr-flow-buttons" },
        button("−", "smaller", () => zoom(scale / 1.2)), button("+", "larger", () => zoom(scale * 1.2)), button("Fit", "fit to the width", fit),
        button("SVG", "save as SVG", () => save("svg")), button("PNG", "save as PNG", () => save("png"))));
    const base = element("canvas", { className: "lr-flow-base" });
    const above = element("canvas", { className: "lr-flow-above" });
    const picture = svgElement("svg", { viewBox: `0 0 ${data.width} ${data.height}`, role: "group", "aria-label": `${data.title}: nodes` });
    const layers = element("div", { className: "lr-flow-layers" });
    const tokens = element("div", { className: "lr-flow-tokens" });
    const stage = element("div", { className: "lr-flow-stage" }, layers, base, above, picture, tokens);
    const scroll = element("div", { className: "lr-flow-scroll" }, stage);
    const panel = element("aside", { className: "lr-flow-panel", hidden: true });
    panel.setAttribute("aria-label", "the opened node");
    const legend = element("p", { className: "lr-flow-legend" });
    for (const [sign, text] of [["lr-pos", `for ${data.target}`], ["lr-neg", "against it"]])
      legend.append(element("span", {}, element("i", { className: sign }), text));
    const reading = nodes.some((node) => node.score === null && node.kind === "head") ? "  ○ head, where it reads" : "";
    legend.append(element("span", { textContent: `◆ embedding  ● head${reading}  ■ MLP  ▲ logits; the larger, the more relevance` }));
    if (data.dropped) legend.append(element("span", { textContent: `${data.dropped.toLocaleString("en")} weaker edges are not in this page` }));
    const root = element("div", { className: "lr-flow" }, bar, element("div", { className: "lr-flow-main" }, scroll, panel), legend);
    lensRelevance.keepForPaper(body);
    body.prepend(root);

    data.columns.forEach((x, i) => {
      picture.append(svgElement("line", { class: "lr-column", x1: x, x2: x, y1: 22, y2: data.height - 22 }));
      picture.append(svgElement("text", { class: "lr-token", x, y: 14 }, short(data.labels[i])));
    });
    const tokenLabels = data.columns.map((x, i) => {
      const label = element("span", { textContent: short(data.labels[i]), title: data.tokens[i] });
      tokens.append(label);
      return [label, x];
    });
    const bandLabels = data.bands.map(([name, y]) => {
      picture.append(svgElement("line", { class: "lr-band", x1: 66, x2: data.width - 8, y1: y, y2: y }));
      const label = element("span", { textContent: name });
      layers.append(label);
      return [label, y];
    });
    const marks = nodes.map((node, i) => {
      const mark = svgElement("g", {
        class: `lr-node ${node.score === null ? "lr-hollow" : signOf(node.score)}`, role: "button", tabindex: i ? -1 : 0, "data-node": node.name,
        "data-position": node.position, "data-score": node.score ?? "", "aria-label": `${node.name} at ${where(node)}, ${scoreLine(node.score)}`,
      });
      mark.append(svgElement("path", { class: "lr-mark", d: outline(node) }), svgElement("circle", { class: "lr-hit", cx: node.x, cy: node.y, r: Math.max(node.r, 11) }));
      if (node.labelled) mark.append(svgElement("text", { x: node.x, y: node.y - node.r - 3 }, node.name));
      mark.addEventListener("pointerenter", () => look(i));
      mark.addEventListener("pointerleave", () => look(null));
      mark.addEventListener("focus", () => look(i, true));
      mark.addEventListener("blur", () => look(null));
      mark.addEventListener("click", () => open(i));
      return mark;
    });
    picture.append(...[...marks].sort((a, b) => nodes[marks.indexOf(b)].r - nodes[marks.indexOf(a)].r));

    // ---- drawing
    function strokes(context, list, solid) {
      const colours = { "lr-pos": colour("--lr-pos"), "lr-neg": colour("--lr-neg") };
      context.lineCap = "round";
      for (const i of list) {
        const [source, target, score] = edges[i];
        const strength = Math.sqrt(Math.abs(score) / strongest);
        const [x1, y1, x2, y2] = curves[i];
        context.strokeStyle = colours[signOf(score)];
        context.globalAlpha = solid ? 0.95 : 0.2 + 0.6 * strength;
        context.lineWidth = 0.5 + 3.3 * strength + (solid ? 0.6 : 0);
        context.beginPath();
        context.moveTo(nodes[source].x, nodes[source].y);
        context.bezierCurveTo(x1, y1, x2, y2, nodes[target].x, nodes[target].y);
        context.stroke();
      }
    }
    function paint(canvas, list, solid) {
      const ratio = Math.min(window.devicePixelRatio || 1, Math.sqrt(MAX_PIXELS / (data.width * scale * data.height * scale)));
      const width = Math.round(data.width * scale * ratio);
      const height = Math.round(data.height * scale * ratio);
      if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
      const context = canvas.getContext("2d");
      context.setTransform(1, 0, 0, 1, 0, 0);
      context.clearRect(0, 0, width, height);
      context.setTransform(scale * ratio, 0, 0, scale * ratio, 0, 0);
      strokes(context, list, solid);
    }
    const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
    function visible(limit = shown) {
      const list = [];
      for (let i = Math.min(shown, limit) - 1; i >= 0; i -= 1) if (!found || found.has(edges[i][0]) || found.has(edges[i][1])) list.push(i);
      return list; // strongest last: they are drawn on top
    }
    function drawAll(limit) {
      const list = visible(limit);
      paint(base, list, false);
      drawAttention(null);
      root.dataset.drawn = list.length;
    }
    function drawAttention(node) {
      const looked = node ?? opened;
      // An opened node shows its strongest edges, also those that the slider took away.
      const listed = (i, rank) => (looked === opened ? rank < LISTED : i < shown);
      const list = focusEdge !== null ? [focusEdge] : looked === null ? [] : incident[looked].filter(listed).reverse();
      paint(above, list, true);
      base.style.opacity = list.length ? 0.25 : 1;
      root.dataset.highlighted = list.length;
    }
    let asked = false, rest = 0;
    function redrawSoon() {
      if (asked) return;
      asked = true;
      requestAnimationFrame(() => {
        asked = false;
        drawAll(DRAFT);
        clearTimeout(rest);
        if (shown > DRAFT) rest = setTimeout(drawAll, 150);
      });
    }

    // ---- attention: hover and focus
    function look(i, focused = false) {
      focusEdge = null;
      drawAttention(i);
      if (i === null) return lensRelevance.hideTip();
      const box = marks[i].getBoundingClientRect();
      const lines = [nodes[i].name, `at ${where(nodes[i])}`, scoreLine(nodes[i].score)];
      lensRelevance.showTip(lines, focused ? box.right : box.left + box.width / 2, box.bottom - 8);
    }
    function lookAtEdge(event) {
      if (event.target.closest(".lr-node")) return;
      const frame = picture.getBoundingClientRect();
      const i = nearestEdge((event.clientX - frame.left) / scale, (event.clientY - frame.top) / scale);
      if (i !== focusEdge) { focusEdge = i; drawAttention(null); }
      if (i === null) return lensRelevance.hideTip();
      const edge = edges[i];
      lensRelevance.showTip([`${nodes[edge[0]].name} → ${reads(edge)}`, `from ${where(nodes[edge[0]])}`, `to ${where(nodes[edge[1]])}`, scoreLine(edge[2])], event.clientX, event.clientY);
    }
    function nearestEdge(x, y) {
      let best = null;
      let nearest = (5 / scale) ** 2;
      for (const i of visible()) {
        const [from, to] = [nodes[edges[i][0]], nodes[edges[i][1]]];
        const [x1, y1, x2, y2] = curves[i];
        if (x < Math.min(from.x, to.x, x1, x2) - 6 || x > Math.max(from.x, to.x, x1, x2) + 6 || y < Math.min(from.y, to.y) - 6 || y > Math.max(from.y, to.y) + 6) continue;
        for (let k = 0; k <= 40; k += 1) {
          const t = k / 40, u = 1 - t;
          const dx = u * u * u * from.x + 3 * u * u * t * x1 + 3 * u * t * t * x2 + t * t * t * to.x - x;
          const dy = u * u * u * from.y + 3 * u * u * t * y1 + 3 * u * t * t * y2 + t * t * t * to.y - y;
          if (dx * dx + dy * dy <= nearest) { nearest = dx * dx + dy * dy; best = i; }
        }
      }
      return best;
    }
    let pending = null;
    picture.addEventListener("pointermove", (event) => {
      if (!pending) requestAnimationFrame(() => { lookAtEdge(pending); pending = null; });
      pending = event;
    });
    picture.addEventListener("pointerleave", () => { focusEdge = null; drawAttention(null); lensRelevance.hideTip(); });

    // ---- opening a node
    function open(i) {
      if (opened !== null) marks[opened].classList.remove("lr-open");
      opened = i;
      panel.hidden = i === null;
      panel.dataset.node = i === null ? "" : nodes[i].name;
      if (i !== null) {
        marks[i].classList.add("lr-open");
        fillPanel(i);
        rove(i);
      }
      drawAttention(null);
    }
    function fillPanel(i) {
      const node = nodes[i];
      const close = button("✕", "close", () => { open(null); marks[i].focus(); });
      const parts = [element("header", {}, element("h5", { textContent: node.name }), close), element("p", { textContent: `at ${where(node)}` })];
      parts.push(element("p", { className: "lr-flow-score", textContent: scoreLine(node.score) }));
      const readers = Object.entries(node.readers);
      if (readers.length) parts.push(...block("Relevance of its inputs", [], readers));
      for (const detail of node.details) parts.push(...block(detail.name || "Details", detail.columns, detail.rows));
      parts.push(...edgeList("Reads from", "in", incident[i].filter((e) => edges[e][1] === i), 0), ...edgeList("Read by", "out", incident[i].filter((e) => edges[e][0] === i), 1));
      panel.replaceChildren(...parts);
      panel.scrollTop = 0;
    }
    function cell(value, isScore = false) {
      const isNumber = typeof value === "number";
      const text = !isNumber ? value ?? "–" : isScore === true || !Number.isInteger(value) ? number(value) : String(value); // 4 is a position
      const made = element("td", { className: isNumber ? "num" : "", textContent: text });
      if (isNumber) made.dataset.value = value;
      return made;
    }
    function block(title, columns, rows) {
      const table = element("table");
      const numeric = (i) => rows.some((row) => typeof row[i] === "number");
      if (columns.length) table.append(element("tr", {}, ...columns.map((text, i) => element("th", { textContent: text, className: numeric(i) ? "num" : "" }))));
      for (const row of rows) table.append(element("tr", {}, ...row.map((value) => cell(value))));
      return [element("h6", { textContent: title }), table];
    }
    function edgeList(title, direction, list, end) {
      if (!list.length) return [];
      const table = element("table", { className: `lr-flow-${direction}` });
      for (const e of list.slice(0, LISTED)) {
        const other = edges[e][end];
        const name = end ? reads(edges[e]) : nodes[other].name + (edges[e][3] ? ` → ${edges[e][3]}` : "");
        const go = element("button", { type: "button", textContent: `${name} at ${where(nodes[other])}`, onclick: () => { open(other); marks[other].focus(); reveal(other); } });
        const row = element("tr", {}, element("td", {}, element("b", { className: signOf(edges[e][2]) }), go), cell(edges[e][2], true));
        row.dataset.score = edges[e][2];
        const attend = (edge) => () => { focusEdge = edge; drawAttention(null); };
        row.addEventListener("pointerenter", attend(e));
        row.addEventListener("pointerleave", attend(null));
        table.append(row);
      }
      const more = list.length > LISTED ? `, the strongest ${LISTED}` : "";
      return [element("h6", { textContent: `${title} (${list.length} ${list.length === 1 ? "edge" : "edges"}${more})` }), table];
    }

    // ---- slider, search, keys, zoom
    function position(n) { return edges.length > 1 ? Math.round((1000 * Math.log(Math.max(n, 1))) / Math.log(edges.length)) : 1000; }
    function setShown(n) {
      shown = Math.max(Math.min(n, edges.length), Math.min(1, edges.length));
      const weakest = shown ? `, |score| ≥ ${number(Math.abs(edges[shown - 1][2]), false)}` : "";
      count.textContent = `${shown.toLocaleString("en")} of ${edges.length.toLocaleString("en")}${weakest}`;
      slider.setAttribute("aria-valuetext", count.textContent);
      root.dataset.shown = shown;
    }
    slider.setAttribute("aria-label", "how many of the strongest edges are shown");
    slider.addEventListener("input", () => { setShown(Math.round(edges.length ** (slider.value / 1000))); redrawSoon(); });
    search.setAttribute("aria-label", "find a component");
    function match() {
      const wanted = search.value.trim().toLowerCase();
      const exact = names.some((name) => name.toLowerCase() === wanted);
      const fits = (name) => (exact ? name === wanted : name.startsWith(wanted));
      found = wanted ? new Set(nodes.flatMap((node, i) => (fits(node.name.toLowerCase()) ? [i] : []))) : null;
      hits.textContent = !found ? "" : found.size ? `${found.size} ${found.size === 1 ? "node" : "nodes"}` : "none";
      marks.forEach((mark, i) => mark.classList.toggle("lr-faint", Boolean(found) && !found.has(i)));
      redrawSoon();
    }
    search.addEventListener("input", match);
    search.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && search.value) { search.value = ""; match(); event.stopPropagation(); }
      if (event.key !== "Enter" || !found?.size) return;
      const best = [...found].sort((a, b) => Math.abs(nodes[b].score ?? 0) - Math.abs(nodes[a].score ?? 0))[0];
      open(best);
      marks[best].focus();
      reveal(best);
    });
    root.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && opened !== null) { const was = opened; open(null); marks[was].focus(); }
      if (event.key === "/" && event.target !== search) { event.preventDefault(); search.focus(); }
    });
    function rove(i) {
      marks.forEach((mark) => mark.getAttribute("tabindex") === "0" && mark.setAttribute("tabindex", -1));
      marks[i].setAttribute("tabindex", 0);
    }
    // Opening scrolls inside the picture only: the page stays where the reader has it.
    function reveal(i) {
      scroll.scrollTo({ left: nodes[i].x * scale - scroll.clientWidth / 2, top: nodes[i].y * scale - scroll.clientHeight / 2 });
    }
    picture.addEventListener("keydown", (event) => {
      const i = marks.indexOf(event.target);
      if (i < 0) return;
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); open(i); }
      const step = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] }[event.key];
      if (!step) return;
      event.preventDefault();
      // The nearest mark in that direction, where being off to the side counts three times.
      let best = null, nearest = Infinity;
      nodes.forEach((node, j) => {
        const [dx, dy] = [node.x - nodes[i].x, node.y - nodes[i].y];
        const along = dx * step[0] + dy * step[1];
        const distance = along + 3 * Math.abs(dx * step[1] + dy * step[0]);
        if (along > 1 && distance < nearest) { nearest = distance; best = j; }
      });
      if (best === null) return;
      rove(best);
      marks[best].focus({ preventScroll: true });
      reveal(best);
    });
    function zoom(wanted) {
      scale = Math.min(Math.max(wanted, 0.2), 4);
      stage.style.width = `${data.width * scale}px`;
      stage.style.height = `${data.height * scale}px`;
      tokens.style.fontSize = layers.style.fontSize = `${Math.min(Math.max(12 * scale, 8.5), 12)}px`;
      bandLabels.forEach(([label, y]) => (label.style.top = `${y * scale}px`));
      tokenLabels.forEach(([label, x]) => (label.style.left = `${x * scale}px`));
      drawAll();
    }
    // Below two thirds labels cannot be read: then the picture scrolls instead.
    function fit() {
      zoom(Math.max(Math.min((scroll.clientWidth - 2) / data.width, (0.87 * window.innerHeight) / data.height, 1.15), 0.66));
      if (opened !== null) reveal(opened);
    }

    // ---- files for papers: the picture as it stands, on white
    function asSvg() {
      const lines = visible().map((i) => {
        const [s, t, score] = edges[i];
        const strength = Math.sqrt(Math.abs(score) / strongest);
        return svgElement("path", { d: `M${nodes[s].x} ${nodes[s].y}C${curves[i].join(" ")} ${nodes[t].x} ${nodes[t].y}`, fill: "none", stroke: FILLS[signOf(score)],
          "stroke-width": (0.5 + 3.3 * strength).toFixed(2), "stroke-opacity": (0.2 + 0.6 * strength).toFixed(3) });
      });
      const points = nodes.flatMap((node) => {
        const fill = node.score === null ? "#ffffff" : FILLS[signOf(node.score)];
        const mark = svgElement("path", { d: outline(node), fill, stroke: node.score === null ? "#59636e" : "#ffffff" });
        const style = { x: node.x, y: node.y - node.r - 3, "text-anchor": "middle", "font-size": 10, "font-weight": 600, fill: "#1b1f24" };
        return node.labelled ? [mark, svgElement("text", style, node.name)] : [mark];
      });
      const text = (x, y, label, anchor) => svgElement("text", { x, y, "text-anchor": anchor, "font-size": 11, fill: "#1b1f24" }, label);
      const tokens = data.columns.map((x, i) => text(x, data.height - 6, short(data.labels[i]), "middle"));
      const bands = data.bands.map(([name, y]) => text(6, y + 4, name, "start"));
      const made = svgElement("svg", { xmlns: SVG, width: data.width, height: data.height, viewBox: `0 0 ${data.width} ${data.height}`, "font-family": "Helvetica, Arial, sans-serif" });
      made.append(svgElement("rect", { width: "100%", height: "100%", fill: "#ffffff" }), ...lines, ...points, ...tokens, ...bands);
      return new XMLSerializer().serializeToString(made);
    }
    async function save(kind) {
      let file = new Blob([asSvg()], { type: "image/svg+xml" });
      if (kind === "png") {
        const image = new Image();
        image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(asSvg())}`;
        await image.decode();
        const canvas = element("canvas", { width: 2 * data.width, height: 2 * data.height });
        canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
        file = await new Promise((done) => canvas.toBlob(done, "image/png"));
      }
      const link = element("a", { href: URL.createObjectURL(file), download: `flow.${kind}` });
      link.click();
      root.dataset.saved = `${kind} ${file.size}`;
      setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
    }

    setShown(shown);
    fit();
    const start = nodes.findLastIndex((node) => node.kind === "logits"); // where the story ends, should not all of it fit
    if (start >= 0) reveal(start);
    let width = scroll.clientWidth;
    new ResizeObserver(() => {
      if (scroll.clientWidth === width) return;
      width = scroll.clientWidth;
      fit();
    }).observe(scroll);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawAll());
  });

  // As analyses.views.flow_layout.curve.
  function curve(source, target) {
    const rise = target.y - source.y;
    const bow = Math.abs(target.x - source.x) < 1.5 * 27 && Math.abs(rise) > 2.5 * 27 ? Math.min(46, 0.1 * Math.abs(rise)) : 0;
    return [source.x + bow, source.y + 0.4 * rise, target.x + bow, target.y - 0.4 * rise];
  }

  function outline({ kind, x, y, r }) {
    if (kind === "head") return `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0Z`;
    if (kind === "mlp") return `M${x - 0.88 * r} ${y - 0.88 * r}h${1.76 * r}v${1.76 * r}h${-1.76 * r}Z`;
    if (kind === "embed") return `M${x} ${y - 1.2 * r}L${x + 1.2 * r} ${y}L${x} ${y + 1.2 * r}L${x - 1.2 * r} ${y}Z`;
    return `M${x} ${y - 1.2 * r}L${x + 1.15 * r} ${y + 0.8 * r}H${x - 1.15 * r}Z`;
  }
})();
