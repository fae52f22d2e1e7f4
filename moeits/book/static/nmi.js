// NMI of experts and Algorithm 3 in plain JavaScript, as moeits/histograms.py, nmi.py and method.py compute them in
// float64. tests/book/test_laboratory.py holds the two together.

function quartile(sorted, share) {
  const rank = (sorted.length - 1) * share;
  const below = Math.floor(rank);
  const low = sorted[below];
  return low + (sorted[Math.min(below + 1, sorted.length - 1)] - low) * (rank - below);
}

function iqr(sorted) {
  return quartile(sorted, 0.75) - quartile(sorted, 0.25);
}

function autoBins(sorted) {
  const size = sorted.length;
  const extent = sorted[size - 1] - sorted[0];
  const freedmanDiaconis = 2 * iqr(sorted) * size ** (-1 / 3);
  const width = Math.min(
    Math.max(freedmanDiaconis, extent / Math.sqrt(size) / 2),
    extent / (Math.log2(size) + 1),
  );
  return Math.ceil(extent / width);
}

// H = log N - (1/N) sum c log c, in nats (equation 4).
function entropy(counts, size) {
  let sum = 0;
  for (const c of counts) if (c > 1) sum += c * Math.log(c);
  return Math.log(size) - sum / size;
}

// The bin of every weight: equal widths from the least to the largest, bins = 0 for the automatic number.
function discretise(weights, bins) {
  const sorted = weights.slice().sort();
  const least = sorted[0];
  const largest = sorted[sorted.length - 1];
  const number = bins || autoBins(sorted);
  const width = (largest - least) / number;
  const edge = (b) => (b < number ? b * width + least : largest);
  const codes = new Uint16Array(weights.length);
  const counts = new Uint32Array(number);
  weights.forEach((x, n) => {
    let b = Math.min(Math.floor((x - least) / width), number - 1);
    while (b > 0 && x < edge(b)) b -= 1;
    while (b < number - 1 && x >= edge(b + 1)) b += 1;
    codes[n] = b;
    counts[b] += 1;
  });
  return { codes, number, entropy: entropy(counts, weights.length) };
}

// NMI = (H(X) + H(Y) - H(X,Y)) / sqrt(H(X) H(Y)) (equations 5 and 6).
function nmi(a, b) {
  const joint = new Uint32Array(a.number * b.number);
  for (let n = 0; n < a.codes.length; n += 1) joint[a.codes[n] * b.number + b.codes[n]] += 1;
  const shared = a.entropy + b.entropy - entropy(joint, a.codes.length);
  return Math.min(Math.max(shared / Math.sqrt(a.entropy * b.entropy), 0), 1);
}

// R of all pairs, the mean over the projections (equations 7 to 11); block[projection][expert] are its weights.
function nmiMatrix(block, bins) {
  const experts = block[0].length;
  const R = Array.from({ length: experts }, () => new Float64Array(experts));
  const numbers = [];
  for (const projection of block) {
    const coded = projection.map((weights) => discretise(weights, bins));
    numbers.push(...coded.map((one) => one.number));
    for (let i = 0; i < experts; i += 1) {
      for (let j = i + 1; j < experts; j += 1) {
        R[i][j] += nmi(coded[i], coded[j]) / block.length;
        R[j][i] = R[i][j];
      }
    }
  }
  return { R, fewest: Math.min(...numbers), most: Math.max(...numbers) };
}

// Algorithm 3: the threshold rho, the removals and the kept experts.
function select(R, tau, diagonal) {
  const experts = R.length;
  const entries = [];
  R.forEach((row, i) =>
    row.forEach((value, j) => {
      if (i !== j) entries.push(value);
      else if (diagonal !== "exclude") entries.push(diagonal === "one" ? 1 : 0);
    }),
  );
  const mean = entries.reduce((sum, value) => sum + value, 0) / entries.length;
  const limit = mean + tau * iqr(entries.sort((a, b) => a - b));
  let kept = [...R.keys()];
  const steps = [];
  while (kept.length > 1) {
    let pair = null;
    for (const i of kept) {
      for (const j of kept) if (i < j && (!pair || R[i][j] > R[pair[0]][pair[1]])) pair = [i, j];
    }
    const value = R[pair[0]][pair[1]];
    if (value <= limit) break;
    const means = pair.map((e) => kept.reduce((sum, k) => sum + R[e][k], 0) / (kept.length - 1));
    const removed = means[0] > means[1] ? pair[0] : pair[1];
    steps.push({ removed, pair, nmi: value, means });
    kept = kept.filter((e) => e !== removed);
  }
  return { limit, steps, kept, experts };
}
