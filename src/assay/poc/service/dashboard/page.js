// Shows each snapshot.

const SCHEMA = "assay.poc.snapshot/1";
const SPARK_SECONDS = 120;
const MOST_POINTS = 400;
const LEAST_WIDTH = 100; // of a chart; a hidden one has none

let shown = null; // the last snapshot
let rates = []; // [seconds, rate] of the last two minutes
let shares = []; // [checked, share] of this round since the page was opened
let sharesOf = null; // the round they belong to

function show(snapshot) {
  if (snapshot.schema !== SCHEMA) {
    showSentence("undecided", "The service was changed since this page was loaded: load it again.");
    return false;
  }
  shown = snapshot;
  keepHistory(snapshot);
  put("state", STATES[snapshot.state] ?? visible(snapshot.state));
  showSentence(...sentenceOf(snapshot));
  showFigures(snapshot);
  showRound(snapshot);
  showVerdicts(snapshot.verdicts);
  draw();
  return true;
}

function keepHistory(snapshot) {
  const { time, checked, round } = snapshot;
  rates = rates.filter(([then]) => then > time - SPARK_SECONDS && then < time);
  rates.push([time, snapshot.nonces_per_second]);
  if (sharesOf !== round?.id || checked < (shares.at(-1)?.[0] ?? 0)) shares = [];
  sharesOf = round?.id;
  if (!checked || snapshot.valid_rate === null) return;
  if (shares.at(-1)?.[0] === checked) shares.pop();
  shares.push([checked, snapshot.valid_rate]);
  if (shares.length > MOST_POINTS) shares = shares.filter((_, i) => i % 2 === 1 || i === shares.length - 1);
}

function showFigures(snapshot) {
  const { checked, valid, callbacks, jobs, model } = snapshot;
  const { pending, dead } = callbacks;
  put("rate", rateOf(snapshot.nonces_per_second));
  put("checked", compact(checked));
  put("checked-note", checked ? `in ${duration(snapshot.seconds)}` : "\u00a0");
  put("valid", compact(valid));
  put("valid-note", snapshot.valid_rate === null ? "\u00a0" : percent(snapshot.valid_rate));
  put("pending", compact(pending));
  put("dead", `pending, ${count(dead)} dead`);
  $("dead").classList.toggle("fail", dead > 0);
  put("model", model ? `${visible(model.reference)}, ${model.dtype}, ${model.digest.slice(0, 12)}` : "not loaded");
  put("jobs", `${count(jobs.queued)} queued, ${count(jobs.running)} running`);
  put("uptime", duration(snapshot.uptime_seconds));
  put("version", `assay ${snapshot.version}`);
}

function showRound({ round, next_nonce: next }) {
  $("round").hidden = !round;
  $("no-round").hidden = Boolean(round);
  if (!round) return;
  putName("block", round.block_hash, 80);
  putName("key-of-round", round.public_key, 80);
  put("height", count(round.block_height));
  put("share", shareOf(round));
  put("preset", `${round.preset}, r_target ${round.r_target}`);
  put("shape", `${round.batch_size} × ${round.seq_len} positions`);
  put("begun", moment(round.created_at));
  put("next", count(next));
}

function shareOf({ node_id: node, node_count: nodes, group_id: group, n_groups: groups }) {
  const stride = nodes * groups;
  if (stride === 1) return "all nonces";
  const name = groups > 1 ? `node ${node} of ${nodes}, group ${group} of ${groups}` : `node ${node} of ${nodes}`;
  return `${name}: ${count(node + group * nodes)}, ${count(node + group * nodes + stride)}, …`;
}

function showVerdicts(verdicts) {
  $("verdicts").hidden = !verdicts.length;
  $("no-verdicts").hidden = verdicts.length > 0;
  $("verdict-rows").replaceChildren(...verdicts.map(verdictRow));
}

function verdictRow(verdict) {
  const row = document.createElement("tr");
  const rule = verdict.fraud_detected && verdict.verdict !== "fraud" ? "the count says fraud" : "";
  row.append(
    cell("", badge(verdict.verdict), verdict.fault ? part("note", name(verdict.fault, 60)) : "", rule && part("note", rule)),
    cell("names", part("", name(verdict.public_key, 40)), part("note", name(verdict.block_hash, 40))),
    cell("n", `${count(verdict.n_invalid)} of ${count(verdict.n)}`, part("note", chance(verdict.probability_honest))),
    cell("when", moment(verdict.time)),
  );
  return row;
}

function chance(probability) {
  if (probability < 0) return "";
  return `p ${probability >= 0.001 ? probability.toFixed(3) : probability.toExponential(0).replace("-", "−")}`;
}

function draw() {
  if (!shown || $("funnel").clientWidth < LEAST_WIDTH) return;
  drawSpark($("spark"), rates, SPARK_SECONDS);
  drawRate();
  const { histogram, checked, round } = shown;
  put("histogram-reading", histogramReading());
  if (histogram && checked) drawHistogram($("histogram"), histogram, round.r_target);
  else drawNothing($("histogram"));
}

function drawRate() {
  const judged = judgeRate(shown);
  if (!judged || !shares.length) {
    put("rate-reading", nothingYet());
    return drawNothing($("funnel"));
  }
  const { valid_rate: rate, expected_rate: law, expected_rate_error: error } = shown;
  const [kind, mark, words] = judged;
  $("rate-reading").replaceChildren(
    `${percent(rate)} measured, ${percent(law)} ± ${(100 * error).toFixed(2)} expected of this block. `,
    part("badge " + kind, part("mark", mark), words),
  );
  return drawFunnel($("funnel"), shares, law, error);
}

function nothingYet() {
  if (!shown.round) return "No round yet.";
  if (shown.checked && shown.ready) return "This round publishes vectors, which have no distance.";
  return shown.checked ? "Shown once the model is loaded." : "No nonces yet.";
}

function histogramReading() {
  const { histogram, checked } = shown;
  if (!histogram || !checked) return nothingYet();
  const outside = histogram.below + histogram.above;
  return `${plural(checked, "distance")} over what the law of this block expects, ${outside ? count(outside) : "none"} outside the picture.`;
}

put("begin", `curl -H 'Content-Type: application/json' \\
  ${new URL("api/v1/pow/init/generate", location.href)} -d '{
  "block_hash": "block_alpha", "block_height": 7, "public_key": "node_A", "r_target": 1.416,
  "node_id": 0, "node_count": 1, "batch_size": 32, "seq_len": 256}'`);

const title = () => `${STATES[shown.state] ?? ""} ${shown.state === "GENERATING" ? `${rateOf(shown.nonces_per_second)}/s ` : ""}`.trimEnd();

new ResizeObserver(draw).observe($("main"));
new Link("api/v1/pow/events", { show, title, locked: "Give a key to see what the service does." }).run();
