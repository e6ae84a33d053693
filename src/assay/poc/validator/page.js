// Shows each snapshot of a validator.

const SCHEMA = "assay.poc.validator/1";
const FULL = 7; // natural logarithm of the evidence that fills a bar: a thousand to one

let shown = null; // the last snapshot

function show(snapshot) {
  if (snapshot.schema !== SCHEMA) {
    showSentence("undecided", "The validator was changed since this page was loaded: load it again.");
    return false;
  }
  shown = snapshot;
  put("state", snapshot.ready ? "Validating" : "Loading");
  showSentence(...sentence(snapshot));
  showTiles(snapshot);
  showNodes(snapshot);
  put("promise", promise(snapshot.network));
  showChanges(snapshot.changes);
  showPins(snapshot);
  return true;
}

function sentence(snapshot) {
  const { error, ready, storage_failing: full, nodes_waiting: waiting } = snapshot;
  if (!ready) return error ? ["fail", `The model could not be loaded: ${visible(error)}`] : ["undecided", "The model is being loaded; messages are taken meanwhile."];
  if (full) return ["fail", "The disk takes nothing: messages are refused until there is room."];
  if (error) return ["fail", `The last batch failed: ${visible(error)}`];
  const missing = snapshot.laws.find((law) => law.missing);
  if (missing) return ["undecided", `Nodes of the build ${visible(missing.build)} stay undecided: ${visible(missing.missing)}`];
  if (!snapshot.blocks.length) return ["undecided", "No block is open, so no message is accepted: announce one as shown under What is accepted."];
  return ["", waiting ? `Recomputing a sample of ${plural(waiting, "node")}.` : "Waiting for messages."];
}

function showTiles({ verdicts, recomputed, inbox }) {
  const total = Object.values(verdicts).reduce((a, b) => a + b, 0);
  for (const verdict of Object.keys(VERDICTS)) {
    const found = verdicts[verdict] ?? 0;
    put(verdict, compact(found));
    put(`${verdict}-note`, total ? `${percent(found / total, 1)} of nodes` : "\u00a0");
  }
  $("fraud-note").classList.toggle("fail", (verdicts.fraud ?? 0) > 0);
  put("recomputed", compact(recomputed));
  put("recomputed-note", inbox.nonces ? `of ${compact(inbox.nonces)} nonces` : "\u00a0");
}

function showNodes({ nodes, nodes_pinned: pinned, verdicts }) {
  const total = Object.values(verdicts).reduce((a, b) => a + b, 0);
  $("nodes").hidden = !nodes.length;
  const senders = nodes.filter((node) => node.messages).length;
  const few = nodes.length < total ? `The first ${count(nodes.length)} of ${plural(total, "node")}` : plural(total, "node");
  const sent = nodes.length < total ? "" : `; ${count(senders)} of ${count(pinned)} pinned ones have sent something`;
  put("nodes-reading", total ? `${few}, those with the strongest evidence of anything wrong first${sent}.` : "No node is known.");
  $("node-rows").replaceChildren(...nodes.map(nodeRow));
}

function promise(network) {
  if (!network) return "";
  const { nodes, false_convictions: most, alpha, expected, law_error: error } = network;
  const stated = nodes === null ? "The network states no number of nodes" : `${plural(nodes, "node")}, ${most} false convictions accepted`;
  const more = expected === null ? "" : `, up to ${expected.toPrecision(3)} false convictions`;
  return `${stated}: α of an account is ${alpha.toPrecision(3)}. With the error of the law${more}: ${visible(error)}.`;
}

function nodeRow(node) {
  const row = document.createElement("tr");
  const about = node.build ? `${visible(node.build)}, ` : "";
  const unpaid = typeof node.payable === "number" && node.payable < 1;
  row.append(
    cell("", badge(node.verdict), node.fault ? part("note", name(node.fault, 60)) : "", unpaid ? part("note", `${percent(node.payable, 1)} payable`) : ""),
    cell("names", part("", name(node.public_key, 44)), part("note", `${about}${plural(node.messages, "message")}`)),
    cell("n evidence", odds(node.log_e_value), bar(node.log_e_value)),
    cell("n evidence", odds(node.log_evidence_honest), bar(node.log_evidence_honest)),
    cell("n", count(node.checked), part("note", `of ${compact(node.claimed)}`)),
    cell("n", ...decision(node)),
  );
  return row;
}

function decision(node) {
  if (node.nonces_to_decision === null) return ["–"];
  return [duration(node.seconds_to_decision), part("note", plural(node.nonces_to_decision, "nonce"))];
}

/** Evidence as the odds that it is. */
function odds(logarithm) {
  if (logarithm < Math.log(2)) return "none";
  return logarithm < FULL ? `${compact(Math.exp(logarithm))} to 1` : "over 1000 to 1";
}

function bar(logarithm) {
  const node = document.createElement("meter");
  node.max = FULL;
  node.value = Math.max(0, Math.min(FULL, logarithm));
  return node;
}

function showChanges(changes) {
  $("changes").hidden = !changes.length;
  $("no-changes").hidden = changes.length > 0;
  $("change-rows").replaceChildren(...changes.map(changeRow));
}

function changeRow(change) {
  const row = document.createElement("tr");
  row.append(
    cell("", badge(change.verdict), change.fault ? part("note", name(change.fault, 60)) : ""),
    cell("names", part("", name(change.public_key, 44))),
    cell("n", count(change.nonces), part("note", duration(change.seconds))),
    cell("when", moment(change.at)),
  );
  return row;
}

function showPins(snapshot) {
  const { pins, model, blocks, epoch, inbox } = snapshot;
  putName("model", `${model.reference}, ${model.digest.slice(0, 12)}`, 100);
  $("no-blocks").hidden = blocks.length > 0;
  const open = blocks.map((block) => shorten(block.block_hash, 24));
  put("blocks", open.length ? open.slice(0, 4).join(", ") + (open.length > 4 ? `, and ${open.length - 4} more` : "") : "none is open");
  put("round", `${pins.preset}, ${pins.seq_len} positions, ${pins.strength} bits`);
  put("pinned", plural(snapshot.nodes_pinned, "node"));
  put("commitment", `${epoch.commitment} (epoch ${count(epoch.epoch)})`);
  put("messages", `${compact(inbox.messages)}, ${compact(inbox.repeated)} repeated`);
  put("budget", `${count(snapshot.nonces_per_hour)} nonces an hour`);
  put("uptime", duration(snapshot.uptime_seconds));
  put("version", `assay ${snapshot.version}`);
}

put("announce", `curl -H "Authorization: Bearer $KEY" -H 'Content-Type: application/json' \\
  ${new URL("api/v1/validator/blocks", location.href)} -d '{"block_hash": "block_alpha", "block_height": 7}'`);

const title = () => ((shown.verdicts.fraud ?? 0) ? `${plural(shown.verdicts.fraud, "node")} fraud` : "Validating");

new Link("api/v1/validator/events", { show, title, locked: "Give a key to see what the validator does." }).run();
