// Nodes of the flow view, as SVG: they take focus, clicks and names. Only what is different is written, so that the slider stays fluid.
(() => {
  "use strict";
  const { outline, signOf, svgElement } = lensRelevance.flow;

  // One mark per node; `on` has what happens: enter, leave, focus, blur, click, each with the node's index.
  function marksOf(view, parent, on) {
    const { nodes } = view.data;
    const marks = nodes.map((node, i) => {
      const mark = svgElement("g", {
        class: `lr-node ${node.score === null ? "lr-hollow" : signOf(node.score)}`, role: "button", tabindex: -1, "data-node": node.name,
        "data-position": node.position, "data-score": node.score ?? "", "aria-label": `${node.name} at ${view.where(node)}, ${view.scoreLine(node.score)}`,
      });
      mark.append(svgElement("path", { class: "lr-mark" }), svgElement("circle", { class: "lr-hit" }), svgElement("text"));
      for (const [name, act] of Object.entries(on)) mark.addEventListener(name, (event) => act(i, event));
      return mark;
    });
    // Small ones are on top of large ones. The order is the same whatever is shown.
    const size = (i) => Math.abs(nodes[i].score ?? 0);
    const order = nodes.map((_, i) => i).sort((a, b) => size(a) - size(b)); // the last to be drawn first
    const written = nodes.map(() => ({}));

    function write(i, name, value, act) {
      if (written[i][name] === value) return;
      written[i][name] = value;
      act(value);
    }
    function put(drawn, named) {
      const isDrawn = new Set(drawn);
      let next = null;
      for (const i of order) {
        const mark = marks[i];
        if (!isDrawn.has(i)) { if (mark.parentNode) mark.remove(); continue; }
        if (!mark.parentNode) parent.insertBefore(mark, next);
        next = mark;
        const { x, y, r } = view.layout.marks.get(i), [shape, hit, name] = mark.children;
        write(i, "place", `translate(${x} ${y})`, (value) => mark.setAttribute("transform", value));
        write(i, "r", r, () => {
          shape.setAttribute("d", outline(nodes[i].kind, { x: 0, y: 0, r }));
          name.setAttribute("y", -r - 3);
        });
        write(i, "reach", Math.max(r, Math.min(11, 0.5 * view.layout.step + 2)), (value) => hit.setAttribute("r", value));
        write(i, "name", named.has(i) ? view.nameOf(i) : "", (value) => (name.textContent = value));
        write(i, "pinned", view.state.pinned.has(i), (value) => mark.classList.toggle("lr-pinned", value));
        write(i, "selected", view.state.selected.has(i), (value) => mark.classList.toggle("lr-selected", value));
        write(i, "group", Boolean(view.groupOf(i)), (value) => mark.classList.toggle("lr-group", value));
      }
    }
    return { marks, put };
  }

  Object.assign(lensRelevance.flow, { marksOf });
})();
