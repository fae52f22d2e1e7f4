// Moves the number of kept experts through the budgets that the records hold, and draws what each costs.
const LEFT = 84;
const RIGHT = 372;
const ROW = 30;
const TOP = 30;

const form = root.querySelector("form");
const { model: models, budget: range } = form.elements;
const text = root.querySelector("[role='status']");
const drawing = root.querySelector("svg");
const named = (model, budget) =>
  `${budget ? budget.kept : model.experts} of ${model.experts}${budget && budget.note ? `, ${budget.note}` : ""}`;
const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(3);

function draw(model, budget) {
  const costs = model.budgets.flatMap(({ cloud, random, moeits }) => [
    ...cloud.map((bits) => bits - model.unpruned[0]),
    ...[random, moeits].flatMap((all) => all.map((bits, row) => bits - model.unpruned[row])),
  ]);
  const [least, most] = [Math.min(0, ...costs), Math.max(...costs)];
  const x = (cost) => LEFT + ((RIGHT - LEFT) * (cost - least)) / (most - least);
  const bottom = TOP + ROW * data.rows.length;
  const parts = [`<line class="none" x1="${x(0)}" x2="${x(0)}" y1="${TOP - 14}" y2="${bottom}"/>`];
  data.rows.forEach((name, row) => {
    const y = TOP + ROW * row;
    const cost = (bits) => x(bits[row] - model.unpruned[row]);
    const value = (budget ? budget.moeits : model.unpruned)[row].toFixed(2);
    parts.push(`<text class="start" x="2" y="${y + 4}">${name}</text><text x="${RIGHT + 22}" y="${y + 4}">${value}</text>`);
    if (!budget) return;
    if (row === 0) {
      budget.cloud.forEach((bits, n) =>
        parts.push(`<circle class="cloud" cx="${x(bits - model.unpruned[0])}" cy="${y + ((n * 7) % 17) - 8}" r="2"/>`),
      );
    }
    parts.push(`<circle class="random" cx="${cost(budget.random)}" cy="${y}" r="4.5"/>`);
    if (budget.slices) parts.push(`<rect class="slices" x="${cost(budget.slices) - 4}" y="${y - 4}" width="8" height="8"/>`);
    const at = cost(budget.moeits);
    parts.push(`<path class="moeits" d="M${at - 5} ${y - 5}l10 10m0 -10l-10 10"/>`);
  });
  parts.push(
    `<text class="start" x="${LEFT}" y="12">cost, bits per byte</text><text x="${RIGHT + 14}" y="12">MoEITS</text>`,
    `<text x="${x(0)}" y="${bottom + 10}">0</text><text x="${RIGHT}" y="${bottom + 10}">${most.toFixed(3)}</text>`,
  );
  const legend = bottom + 32;
  parts.push(
    `<path class="moeits" d="M4 ${legend - 5}l10 10m0 -10l-10 10"/><text class="start" x="20" y="${legend + 4}">MoEITS</text>`,
    `<circle class="random" cx="80" cy="${legend}" r="4.5"/><circle class="cloud" cx="92" cy="${legend}" r="2"/>`,
    `<text class="start" x="100" y="${legend + 4}">random subsets, mean and each</text>`,
    `<rect class="slices" x="298" y="${legend - 4}" width="8" height="8"/>`,
    `<text class="start" x="312" y="${legend + 4}">one per slice</text>`,
  );
  drawing.setAttribute("viewBox", `0 0 ${RIGHT + 44} ${legend + 12}`);
  drawing.innerHTML = parts.join("");
}

function inWords(model, budget) {
  if (!budget) {
    return `${model.title}, unpruned: ${data.rows.map((name, row) => `${name} ${model.unpruned[row].toFixed(3)}`).join(", ")} bits per byte.`;
  }
  const below = budget.cloud.filter((bits) => bits < budget.moeits[0]).length;
  const slices = budget.slices ? ` Subsets with one expert of every slice cost ${signed(budget.slices[0] - model.unpruned[0])}.` : "";
  const rows = data.rows.slice(1).map((name, n) => `${name} ${signed(budget.moeits[n + 1] - budget.random[n + 1])}`);
  return (
    `${model.title}, experts kept ${named(model, budget)}: MoEITS costs ` +
    `${signed(budget.moeits[0] - model.unpruned[0])} bits per byte, random subsets ` +
    `${signed(budget.random[0] - model.unpruned[0])} on average; ${below} of ${budget.cloud.length} lose less than MoEITS.` +
    `${slices} MoEITS minus random, by domain: ${rows.join(", ")}.`
  );
}

let waiting = 0;

function update(event) {
  const model = data.models[models.value];
  if (!event || event.target === models) {
    range.max = model.budgets.length;
    range.value = 0;
  }
  const budget = model.budgets[range.value]; // after the last comes the unpruned model
  const shown = named(model, budget);
  root.querySelector("[data-shows]").textContent = shown;
  range.setAttribute("aria-valuetext", shown);
  draw(model, budget);
  clearTimeout(waiting);
  waiting = setTimeout(() => (text.textContent = inWords(model, budget)), event ? 250 : 0);
}

models.innerHTML = data.models.map(({ title }, n) => `<option value="${n}">${title}</option>`).join("");
form.addEventListener("input", update);
form.addEventListener("submit", (event) => event.preventDefault());
update();
