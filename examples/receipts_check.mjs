// The test vectors again, by the reader in TypeScript: node examples/receipts_check.mjs out/receipts.mjs VECTORS
import { readFileSync } from "node:fs";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";

const [path, file] = process.argv.slice(2);
const { gumbel, halves, scores, sketch, stepSeed, words } = await import(pathToFileURL(resolve(path)).href);
const vectors = JSON.parse(readFileSync(file, "utf8"));
let wrong = 0, seen = 0;

function equal(what, found, wanted) {
  seen += 1;
  if (JSON.stringify(found) === JSON.stringify(wanted)) return;
  wrong += 1;
  console.error(`${what}: ${JSON.stringify(found)} instead of ${JSON.stringify(wanted)}`);
}

for (const of of vectors.seeds) {
  equal("words", [words(of, "tokens"), words(of, "sketch")], [of.words, of.sketch_words]);
  equal("seeds of steps", of.steps.map((step) => stepSeed(of.words, step)), of.step_seeds);
}
for (const of of vectors.noise) equal("Gumbel numbers", of.gumbels.map((_, token) => gumbel(of.seed, token)), of.gumbels);
for (const of of vectors.tokens) {
  const found = scores(of.logits, of.sampling, of.seed, of.prompt, of.output);
  equal("scores", found, of.scores); // JSON writes minus infinity as null, as the vectors do
  equal("token", found.indexOf(Math.max(...found)), of.token);
}
for (const of of vectors.sketches) {
  const wanted = halves(of.sketch), found = sketch(of.state, vectors.seeds[0].sketch_words, of.step);
  equal("sketch", found.every((value, i) => Math.abs(value - wanted[i]) < 5e-4), true);
}
console.log(JSON.stringify({ seen, wrong }));
process.exitCode = wrong ? 1 : 0;
