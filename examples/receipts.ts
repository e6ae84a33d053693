// A reader of receipts in TypeScript, written from docs/responses.md and docs/streams.md.
//   tsc --strict --target es2022 --module es2022 --outDir out examples/receipts.ts examples/node.d.ts && mv out/receipts.js out/receipts.mjs
//   node out/receipts.mjs FILE           node, and of every receipt the request id, the number of tokens and the first word of the seed
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";

const f = Math.fround; // one rounding to float32; sums, products, quotients and roots of float32 are exact in double first
const buffer = new DataView(new ArrayBuffer(4));
const LN = [0.06971611827611923, -0.11479733884334564, 0.11685419827699661, -0.12425687164068222, 0.14249058067798615,
  -0.1666780263185501, 0.20000715553760529, -0.2499999701976776, 0.3333333134651184].map(f);
const SIN = [0.004602149128913879, -0.07968021929264069, 0.6459634900093079, 0.42920368909835815].map(f);
const COS = [-0.0009067399078048766, 0.02086152881383896, -0.253669410943985, 1.2337005138397217].map(f);

export function words(of: any, stream: string): number[] {
  const parts = ["assay.responses/1", stream, of.user_seed, of.request_id, of.public_key, of.digest, of.block_hash, of.index];
  const text = parts.map(String).map((part) => `${Buffer.byteLength(part)}:${part}`).join("");
  const digest = createHash("sha256").update(text).digest();
  return [...Array(8).keys()].map((word) => digest.readUInt32BE(4 * word));
}

function hash(seed: number, index: number): number {
  const turned = (x: number, bits: number) => (x << bits) | (x >>> (32 - bits));
  let h = seed ^ Math.imul(turned(Math.imul(index, 0xcc9e2d51), 15), 0x1b873593);
  h = (Math.imul(turned(h, 13), 5) + 0xe6546b64) | 0;
  h = Math.imul(h ^ (h >>> 16), 0x85ebca6b);
  h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35);
  return (h ^ (h >>> 16)) >>> 0;
}

export const stepSeed = (seedWords: number[], step: number) => seedWords.reduce((value, word) => hash(word, value), step);
const horner = (coefficients: number[], x: number) => coefficients.reduce((value, c) => f(f(value * x) + c));

function minusLogOf(k: number, x: number): number { // of 2**-k (1 + x)
  const square = f(x * x), curve = f(f(0.5 * square) - f(f(x * square) * horner(LN, x)));
  return f(f(f(f(k * f(-2.1219444e-4)) + curve) - x) + f(k * f(0.693359375)));
}

function minusLog(u: number): number {
  buffer.setFloat32(0, u);
  const bits = buffer.getInt32(0), power = (bits - 0x3f3504f3) >> 23;
  buffer.setInt32(0, bits - (power << 23));
  return minusLogOf(-power, f(buffer.getFloat32(0) - 1));
}

export function gumbel(seed: number, token: number): number {
  const h = hash(seed, token), x = f(f(2 * Math.min(h, 0xffffffff - h) + 1) * 2 ** -33);
  const upper = x > f(0.29289323) ? minusLogOf(1, f(1 - 2 * x)) : minusLogOf(0, -x);
  return minusLog(h < 2 ** 31 ? upper : minusLog(x));
}

function normals(seed: number, n: number): number[] {
  const pairs = Math.ceil(n / 2), found = new Array<number>(2 * pairs), uniform = (at: number) => f(f(hash(seed, at)) * 2 ** -32);
  for (let i = 0; i < pairs; i++) {
    const radius = f(Math.sqrt(f(2 * minusLog(Math.max(uniform(i), f(1e-10))))));
    const quarters = f(4 * uniform(pairs + i)), low = Math.floor(quarters), over = quarters - low;
    const turns = over > 0.5 || (over === 0.5 && low % 2) ? low + 1 : low, d = f(quarters - turns), x = f(d * d);
    const both = [f(1 - f(x * horner(COS, x))), f(f(2 * d) - f(d * horner(SIN, x)))];
    found[i] = f(radius * ((turns + 1) & 2 ? -both[turns % 2] : both[turns % 2]));
    found[pairs + i] = f(radius * (turns & 2 ? -both[(turns + 1) % 2] : both[(turns + 1) % 2]));
  }
  return found.slice(0, n);
}

export function scores(logits: (number | null)[], of: any, seed: number, prompt: number[], output: number[]): number[] {
  const plain = logits.map((logit, token) => {
    const count = output.filter((id) => id === token).length, r = f(of.repetition_penalty);
    let l = f(f(logit ?? -Infinity) + f(of.logit_bias[token] ?? 0));
    if (count || prompt.includes(token)) l = f(l > 0 ? l / r : l * r);
    return f(f(l - f(f(of.frequency_penalty) * count)) - f(f(of.presence_penalty) * (count ? 1 : 0)));
  });
  if (of.temperature === 0) return plain;
  const z = plain.map((l) => f(l / f(of.temperature)));
  let kept = [...z.keys()].filter((token) => z[token] > -Infinity).sort((a, b) => z[b] - z[a] || a - b);
  const top = z[kept[0]];
  if (of.min_p) kept = kept.filter((token) => z[token] >= f(top + f(Math.log(of.min_p))));
  if (of.top_k && of.top_k < kept.length) { const low = z[kept[of.top_k - 1]]; kept = kept.filter((token) => z[token] >= low); }
  if (of.top_p < 1) {
    const weights = kept.map((token) => Math.exp(z[token] - top)), most = of.top_p * weights.reduce((a, b) => a + b, 0);
    let sum = 0;
    kept = kept.filter((_, at) => { const before = sum; sum += weights[at]; return at === 0 || before < most; });
  }
  return z.map((value, token) => (kept.includes(token) ? f(value + gumbel(seed, token)) : -Infinity));
}

export function sketch(state: number[], seedWords: number[], step: number): number[] {
  const unit = (x: number[]) => { const norm = Math.hypot(...x) + 1e-8; return x.map((value) => value / norm); };
  const p = normals(stepSeed(seedWords, step), 12 * state.length), h = unit(state);
  return unit([...Array(12).keys()].map((row) => h.reduce((sum, value, i) => sum + value * p[row * h.length + i], 0)));
}

export function halves(text: string): number[] { // base64 of little-endian float16
  const raw = Buffer.from(text, "base64");
  return [...Array(raw.length / 2).keys()].map((i) => {
    const bits = raw.readUInt16LE(2 * i), power = (bits >> 10) & 31, rest = (bits & 1023) / 1024;
    return (bits >> 15 ? -1 : 1) * (power ? 2 ** (power - 15) * (1 + rest) : 2 ** -14 * rest);
  });
}

export function read(path: string): { header: any; receipts: any[] } {
  const lines = readFileSync(path, "utf8").split("\n").slice(0, -1);
  const [header, ...rest] = lines.map((line) => JSON.parse(line)), { footer } = rest.pop();
  const sha256 = createHash("sha256").update(lines.slice(1, -1).map((line) => line + "\n").join("")).digest("hex");
  if (footer.sha256 !== sha256 || footer.receipts !== rest.length) throw new Error("the footer does not fit the receipts");
  const of = { public_key: header.public_key, digest: header.model.digest };
  return { header, receipts: rest.map((one) => ({ ...one, words: words({ ...one, ...of }, "tokens"), sketches: one.sketches.map(halves) })) };
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const { header, receipts } = read(process.argv[2]);
  console.log(JSON.stringify({ key: header.public_key, receipts: receipts.map((one) => [one.request_id, one.output.length, one.words[0]]) }));
}
