// Files saved from the flow view: the picture as it stands (SVG, PNG, on white) and the graph with the page's own state (JSON). Each names the
// model, the question and the versions.
(() => {
  "use strict";
  const SVG = "http://www.w3.org/2000/svg";
  const FILLS = { "lr-pos": "#2166ac", "lr-neg": "#b2182b" };
  const { signOf, short, outline, element } = lensRelevance.flow;

  function svgElement(tag, attributes = {}, text) {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    return made;
  }
  const provenance = (info) => Object.entries(info).map(([name, value]) => `${name}: ${value}`).join(" · ");

  function asSvg(view) {
    const { data, layout, width, height } = view, { nodes, edges } = data;
    const facts = provenance(data.info), lines = facts ? facts.match(/.{1,150}(\s|$)|.{1,150}/gu) : [];
    const full = height + 14 * lines.length + 6;
    const paths = view.shownEdges().map((i) => {
      const [s, t, score] = view.ends(i), strength = Math.sqrt(Math.abs(score) / view.strongest);
      const from = layout.marks.get(s), to = layout.marks.get(t);
      return svgElement("path", { d: `M${from.x} ${from.y}C${lensRelevance.flow.curve(from, to).join(" ")} ${to.x} ${to.y}`, fill: "none", stroke: FILLS[signOf(score)],
        "stroke-width": (0.5 + 3.3 * strength).toFixed(2), "stroke-opacity": (0.25 + 0.6 * strength).toFixed(3) });
    });
    const named = new Set(view.labelled());
    const points = [...layout.marks].flatMap(([i, at]) => {
      const score = nodes[i].score;
      const mark = svgElement("path", { d: outline(nodes[i].kind, at), fill: score === null ? "#ffffff" : FILLS[signOf(score)], stroke: score === null ? "#59636e" : "#ffffff" });
      const style = { x: at.x, y: at.y - at.r - 3, "text-anchor": "middle", "font-size": 10, "font-weight": 600, fill: "#1b1f24" };
      return named.has(i) ? [mark, svgElement("text", style, view.nameOf(i))] : [mark];
    });
    const text = (x, y, label, anchor, size = 11) => svgElement("text", { x, y, "text-anchor": anchor, "font-size": size, fill: "#1b1f24" }, label);
    const tokens = layout.columns.map((c) => text(c.centre, height - 8, c.count === 1 ? short(data.labels[c.position]) : "…", "middle"));
    const rows = layout.rows.map((row) => text(6, row.y + 4, row.name, "start"));
    const below = lines.map((line, n) => text(6, height + 8 + 14 * n, line.trim(), "start", 9));
    const made = svgElement("svg", { xmlns: SVG, width, height: full, viewBox: `0 0 ${width} ${full}`, "font-family": "Helvetica, Arial, sans-serif" });
    made.append(svgElement("title", {}, data.title), svgElement("metadata", {}, JSON.stringify({ info: data.info, state: view.savedState() })));
    made.append(svgElement("rect", { width: "100%", height: "100%", fill: "#ffffff" }), ...paths, ...points, ...tokens, ...rows, ...below);
    return new XMLSerializer().serializeToString(made);
  }

  async function save(view, kind) {
    let file;
    if (kind === "json") {
      const { title, target, targetValue, tokens, nodes, edges, paths, info } = view.data;
      const named = ["source", "target", "score", "input", "path_strength"];
      const graph = { format: "lens_relevance flow page 1", title, target, targetValue, info, tokens, nodes, edges: edges.map((e) => Object.fromEntries(named.map((name, i) => [name, e[i]]))), paths, state: view.savedState() };
      file = new Blob([JSON.stringify(graph)], { type: "application/json" });
    } else {
      const svg = asSvg(view);
      file = new Blob([svg], { type: "image/svg+xml" });
      if (kind === "png") {
        const image = new Image();
        image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(svg)}`;
        await image.decode();
        const canvas = element("canvas", { width: 2 * image.width, height: 2 * image.height });
        canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
        file = await new Promise((done) => canvas.toBlob(done, "image/png"));
      }
    }
    const link = element("a", { href: URL.createObjectURL(file), download: `flow.${kind}` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
    return file.size;
  }

  Object.assign(lensRelevance.flow, { svgElement, save });
})();
