// The laboratory: changes the weights of a layer as the reader asks, measures R anew (nmi.js) and draws it.
const BINS = [0, 4, 8, 16, 32, 64, 128, 256]; // 0: automatic
const CELL = 20;
const GAP = 4; // between families
const LEFT = 38;
const TOP = 26;
const STRONGEST = 0.5; // NMI of the last colour, unless a pair has more

const form = root.querySelector("form");
const fields = form.elements;
const text = root.querySelector("[role='status']");
const drawing = root.querySelector("svg");
const layers = data.layers.map((layer) => {
  const bytes = Int8Array.from(atob(layer.codes), (letter) => letter.charCodeAt(0));
  const size = data.neurons * data.width;
  let at = 0;
  // Projections, experts, and of each a matrix with a row for every neuron.
  const block = layer.steps.map((steps) =>
    steps.map((step) => Float64Array.from(bytes.subarray(at, (at += size)), (code) => code * step)),
  );
  return { ...layer, block };
});

// Numbers from a seed, the same in every browser: mulberry32, and normal ones by Box and Muller.
function generator(seed) {
  let state = seed;
  const uniform = () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
  const normal = () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
  return { uniform, normal };
}

function shuffled(count, random) {
  const order = [...Array(count).keys()];
  for (let i = count - 1; i > 0; i -= 1) {
    const j = Math.floor(random.uniform() * (i + 1));
    [order[i], order[j]] = [order[j], order[i]];
  }
  return order;
}

// The weights after scaling, noise and reordering; `which` is the number of the expert in the drawing.
function changed(weights, projection, which, settings) {
  const { scale, noise, permuted } = settings;
  const factors = generator(1000 + which);
  const draws = generator(2000 + 100 * projection + which);
  const order = which < permuted ? shuffled(data.neurons, generator(3000 + which)) : [...Array(data.neurons).keys()];
  const power = [0, 1, -1][projection]; // gate, up, down
  const byRow = order.map(() => {
    const own = Math.exp(factors.normal());
    return scale === "neuron" ? own ** power : scale === "expert" ? 2 ** (which % 4) : 1;
  });
  const scaled = weights.map((w, n) => w * byRow[Math.floor(n / data.width)]);
  const spread = noise * Math.sqrt(scaled.reduce((sum, w) => sum + w * w, 0) / scaled.length);
  const noisy = noise ? scaled.map((w) => w + spread * draws.normal()) : scaled;
  return noisy.map((_, n) => noisy[order[Math.floor(n / data.width)] * data.width + (n % data.width)]);
}

function measure(settings) {
  const layer = layers[settings.layer];
  const block = layer.block.map((matrices, projection) =>
    matrices.map((weights, which) => changed(weights, projection, which, settings)),
  );
  return { block, ...nmiMatrix(block, settings.bins) };
}

function colour(value, most) {
  return data.colours[Math.round(Math.min(value / most, 1) * (data.colours.length - 1))];
}

function draw(layer, { R }, { limit, kept }) {
  const experts = layer.names.length;
  const remain = new Set(kept);
  const place = (i) => CELL * i + (layer.families ? GAP * Math.floor((i * data.families) / experts) : 0);
  const side = place(experts - 1) + CELL;
  const pairs = R.flatMap((row, i) => [...row].map((value, j) => ({ i, j, value }))).filter(({ i, j }) => i !== j);
  const values = pairs.map(({ value }) => value);
  const [least, largest] = [Math.min(...values), Math.max(...values)];
  const x = (value) => LEFT + (side * (value - least)) / (largest - least || 1);
  const both = ({ i, j }) => remain.has(i) && remain.has(j);
  const related = ({ i, j }) => layer.families && layer.families[i] === layer.families[j];
  const strip = TOP + side + 24;
  const parts = layer.names.map((name, i) => {
    const looks = remain.has(i) ? "" : ' class="gone"';
    const middle = place(i) + CELL / 2;
    const family = layer.families ? `${layer.families[i]} ` : "";
    return (
      `<text${looks} x="${LEFT + middle}" y="${TOP - 8}">${name}</text>` +
      `<text${looks} x="${LEFT - 18}" y="${TOP + middle + 4}">${family}${name}</text>`
    );
  });
  for (const pair of pairs) {
    const looks = `${both(pair) ? "" : "gone"} ${pair.value > limit ? "above" : ""}`;
    parts.push(
      `<rect class="${looks}" x="${LEFT + place(pair.j) + 1.5}" y="${TOP + place(pair.i) + 1.5}" ` +
        `width="${CELL - 3}" height="${CELL - 3}" fill="${colour(pair.value, Math.max(STRONGEST, largest))}"/>`,
    );
    if (pair.i < pair.j) {
      const y = strip + (related(pair) ? 0 : 18);
      parts.push(`<line class="${looks}" x1="${x(pair.value)}" x2="${x(pair.value)}" y1="${y}" y2="${y + 14}"/>`);
    }
  }
  const at = x(Math.min(Math.max(limit, least), largest));
  parts.push(
    `<line class="rho" x1="${at}" x2="${at}" y1="${strip - 6}" y2="${strip + 38}"/>`,
    `<text x="${LEFT + 14}" y="${strip + 52}">${least.toFixed(3)}</text>`,
    `<text x="${LEFT + side - 14}" y="${strip + 52}">${largest.toFixed(3)}</text>`,
    `<text x="${LEFT + side / 2}" y="${strip + 52}">NMI of each pair; dashed: rho</text>`,
  );
  if (layer.families) parts.push(`<text x="${LEFT - 20}" y="${strip + 11}">copies</text>`);
  parts.push(`<text x="${LEFT - 20}" y="${strip + 29}">${layer.families ? "others" : "pairs"}</text>`);
  drawing.setAttribute("viewBox", `0 0 ${LEFT + side + 6} ${strip + 58}`);
  drawing.innerHTML = parts.join("");
}

function inWords(layer, found, chosen, settings) {
  const { R, fewest, most } = found;
  const sums = { copies: [0, 0], others: [0, 0] };
  for (let i = 0; i < R.length; i += 1) {
    for (let j = 0; j < i; j += 1) {
      const kind = layer.families && layer.families[i] === layer.families[j] ? "copies" : "others";
      sums[kind][0] += R[i][j];
      sums[kind][1] += 1;
    }
  }
  const mean = ([sum, count]) => (sum / count).toFixed(3);
  const named = (i) => (layer.families ? `${layer.names[i]} (${layer.families[i]})` : layer.names[i]);
  const bins = fewest === most ? fewest : `${fewest} to ${most}`;
  const levels = layer.families
    ? `copies of a slice have a mean NMI of ${mean(sums.copies)}, other pairs ${mean(sums.others)}`
    : `pairs have a mean NMI of ${mean(sums.others)}`;
  const lines = chosen.steps.map(
    (step) =>
      `Expert ${named(step.removed)} is removed: experts ${named(step.pair[0])} and ${named(step.pair[1])} have an NMI ` +
      `of ${step.nmi.toFixed(4)}; their row means are ${step.means.map((m) => m.toFixed(4)).join(" and ")}.`,
  );
  root.querySelector("ol").innerHTML = lines.map((line) => `<li>${line}</li>`).join("");
  const lost = layer.families
    ? [...new Set(layer.families)].filter((f) => !chosen.kept.some((i) => layer.families[i] === f))
    : [];
  const whole = !layer.families ? "" : lost.length ? ` No copy of ${lost.join(", ")} is kept.` : " One copy or more of every slice is kept.";
  return (
    `${layer.title}, ${bins} bins: ${levels}. At tau = ${settings.tau.toFixed(2)} the threshold rho is ` +
    `${chosen.limit.toFixed(3)}, and ${chosen.kept.length} of ${R.length} experts are kept: ` +
    `${chosen.kept.map(named).join(", ")}.${whole}`
  );
}

function settingsNow() {
  return {
    layer: Number(fields.layer.value),
    bins: BINS[fields.bins.value],
    permuted: Number(fields.permuted.value),
    scale: fields.scale.value,
    noise: Number(fields.noise.value),
    tau: Number(fields.tau.value),
    diagonal: fields.diagonal.value,
  };
}

let measured = null;
let waiting = 0;

function update() {
  const settings = settingsNow();
  const { tau, diagonal, ...weights } = settings;
  const asked = JSON.stringify(weights);
  if (!measured || measured.asked !== asked) measured = { asked, found: measure(settings) };
  const layer = layers[settings.layer];
  const chosen = select(measured.found.R, tau, diagonal);
  draw(layer, measured.found, chosen);
  const shown = {
    bins: settings.bins || "automatic",
    permuted: `${settings.permuted} of ${layer.names.length}`,
    noise: settings.noise.toFixed(1),
    tau: tau.toFixed(2),
  };
  for (const [name, value] of Object.entries(shown)) {
    root.querySelector(`[data-shows='${name}']`).textContent = value;
    fields[name].setAttribute("aria-valuetext", value);
  }
  // A screen reader speaks once, when the reader has come to rest.
  clearTimeout(waiting);
  const words = inWords(layer, measured.found, chosen, settings);
  waiting = setTimeout(() => (text.textContent = words), text.dataset.spoken ? 250 : 0);
  text.dataset.spoken = "yes";
}

fields.layer.innerHTML = layers.map((layer, i) => `<option value="${i}">${layer.title}</option>`).join("");
fields.permuted.max = layers[0].names.length;
form.addEventListener("input", update);
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("reset", () => setTimeout(update));
update();
root.measure = (settings) => {
  const found = measure(settings);
  return { ...found, ...select(found.R, settings.tau, settings.diagonal) };
};
