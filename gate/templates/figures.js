(function () {
  "use strict";
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const settings = {
    displaylogo: false,
    responsive: true,
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
    // By default Plotly offers to send the chart to its makers' cloud.
    showSendToCloud: false,
    plotlyServerURL: "",
  };

  // A figure drawn while hidden gets no width, so each is drawn when it first shows.
  function draw() {
    document.querySelectorAll("[data-figure]").forEach(function (holder) {
      if (holder.dataset.state || holder.offsetParent === null) return;
      const figure = figures[holder.dataset.figure];
      holder.dataset.state = "drawing";
      holder.textContent = "";
      const tools = { displayModeBar: figure.layout.dragmode === "zoom" };
      window.Plotly.newPlot(holder, figure.data, figure.layout, Object.assign(tools, settings)).then(function () {
        holder.dataset.state = "drawn";
        // Where the models part is at the right end.
        holder.parentElement.scrollLeft = holder.parentElement.scrollWidth;
      });
    });
  }

  const chooser = document.getElementById("chooser");
  function choose() {
    document.querySelectorAll("[data-choice]").forEach(function (section) {
      section.hidden = section.dataset.choice !== chooser.value;
    });
    draw();
  }
  if (chooser) {
    chooser.addEventListener("change", choose);
    choose();
  }
  document.querySelectorAll("details").forEach(function (details) {
    details.addEventListener("toggle", draw);
  });
  window.addEventListener("beforeprint", function () {
    document.querySelectorAll("details").forEach(function (details) {
      details.open = true;
    });
    draw();
  });
  draw();
})();
