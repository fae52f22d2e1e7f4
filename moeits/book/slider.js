// Moves tau on a figure that moeits/slider.py has drawn: which experts go, and where rho lies. Algorithm 3 itself ran
// in Python; the order of removal does not depend on tau, so the threshold only decides how many of its steps are taken.
(function () {
  const root = document.getElementById("NAME");
  const data = JSON.parse(root.querySelector("script[type='application/json']").textContent);
  const range = root.querySelector("input");
  const text = root.querySelector("[aria-live]");
  const output = root.querySelector("output");
  const rho = root.querySelector(".rho");
  const pairs = root.querySelectorAll("[data-nmi]");

  function draw() {
    const tau = Number(range.value);
    const limit = data.mean + tau * data.iqr;
    const steps = data.steps.filter((step) => step.nmi > limit);
    const gone = new Set(steps.map((step) => step.removed));
    const kept = [...Array(data.experts).keys()].filter((expert) => !gone.has(expert));
    for (const pair of pairs) {
      const left = !gone.has(Number(pair.dataset.i)) && !gone.has(Number(pair.dataset.j));
      pair.classList.toggle("gone", !left);
      pair.classList.toggle("above", Number(pair.dataset.nmi) > limit);
    }
    for (const name of root.querySelectorAll("[data-expert]")) {
      name.classList.toggle("gone", gone.has(Number(name.dataset.expert)));
    }
    const x = data.left + data.scale * (Math.min(limit, data.largest) - data.least);
    rho.setAttribute("transform", `translate(${x.toFixed(1)} 0)`);
    output.textContent = tau.toFixed(2);
    range.setAttribute("aria-valuetext", `tau ${tau.toFixed(2)}`);
    const last = steps[steps.length - 1];
    const why = last
      ? `The last removed expert is ${last.removed}, from the pair ${last.pair[0]} and ${last.pair[1]} with an NMI of ${last.nmi.toFixed(3)}.`
      : "No pair exceeds rho.";
    text.textContent =
      `tau = ${tau.toFixed(2)}, rho = ${limit.toFixed(3)}: ${kept.length} of ${data.experts} experts are kept ` +
      `(${kept.join(", ")}). ${why}`;
  }

  range.disabled = false;
  range.addEventListener("input", draw);
  draw();
})();
