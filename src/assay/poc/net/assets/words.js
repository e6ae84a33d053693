// How figures and states are said.

const THIN = "\u202f";
const STATES = { IDLE: "Idle", GENERATING: "Generating", VALIDATING: "Validating", STOPPED: "Stopped" };
const VERDICTS = { honest: ["pass", "✓"], undecided: ["undecided", "?"], faulty: ["undecided", "!"], fraud: ["fail", "✕"] };

function count(value) {
  return Math.round(value).toLocaleString("en").replaceAll(",", THIN);
}

/** A count that has to fit into a tile. */
function compact(value) {
  return value < 1e8 ? count(value) : `${count(value / 1e6)}${THIN}M`;
}

function rateOf(value) {
  return value >= 100 || value === 0 ? count(value) : value.toFixed(1);
}

function percent(share, digits = 2) {
  return `${(100 * share).toFixed(digits)}${THIN}%`;
}

function plural(value, one, many = `${one}s`) {
  return `${count(value)} ${value === 1 ? one : many}`;
}

/** 93784 → "1 d 2 h"; two units at most. */
function duration(seconds) {
  const units = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
  let rest = Math.max(0, Math.floor(seconds));
  const parts = [];
  for (const [name, size] of units) {
    if (rest >= size || (name === "s" && !parts.length)) parts.push(`${Math.floor(rest / size)}${THIN}${name}`);
    rest %= size;
  }
  return parts.slice(0, 2).join(" ");
}

/** The time of day, with the date where it is not today. */
function moment(seconds) {
  const date = new Date(seconds * 1000);
  const time = date.toLocaleTimeString("en-GB");
  if (date.toDateString() === new Date().toDateString()) return time;
  return `${date.toLocaleDateString("en-GB", { day: "numeric", month: "short" })} ${time}`;
}

/** Text of a stranger: what would not be seen, or would turn the line around, is written out. */
function visible(text) {
  return String(text).replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (c) => `\\u{${c.codePointAt(0).toString(16)}}`);
}

/** The beginning and the end of a text that is longer than `most` characters. */
function shorten(text, most) {
  const letters = [...visible(text)];
  if (letters.length <= most) return letters.join("");
  const tail = Math.floor(most / 4);
  return `${letters.slice(0, most - tail - 1).join("")}…${letters.slice(-tail).join("")}`;
}

/** One sentence on what the service does, and whether it is in order. */
function sentenceOf(snapshot) {
  const error = snapshot.error && visible(snapshot.error);
  if (!snapshot.ready) return error ? ["fail", `The model could not be loaded: ${error}`] : ["undecided", "The model is being loaded; the service continues by itself."];
  if (error) return ["fail", `Ended by an error: ${error}. Start the phase again when it is cured.`];
  if (snapshot.paused === "storage") return ["undecided", "Waiting: the disk is full. It continues by itself when there is room."];
  if (snapshot.paused === "callbacks") return ["undecided", "Waiting: too many callbacks are undelivered. It continues when the receiver takes them."];
  const jobs = snapshot.jobs.running ? `Computing ${plural(snapshot.jobs.running, "artifact job")}.` : null;
  return {
    IDLE: ["", jobs ?? (snapshot.round ? "A round is initialised and waits for a phase." : "Waiting for a round.")],
    GENERATING: ["", "Computing nonces of this round."],
    VALIDATING: ["", "Recomputing distances that others send."],
    STOPPED: ["", jobs ?? (snapshot.callbacks.pending ? "Callbacks that are owed are still delivered." : "Nothing runs.")],
  }[snapshot.state] ?? ["undecided", "This page does not know that state: load it again."];
}

/** Where the measured valid rate stands against the law: [badge kind, mark, words]. */
function judgeRate(snapshot) {
  const { checked, valid_rate: rate, expected_rate: law, expected_rate_error: error } = snapshot;
  if (!checked || !(error > 0)) return null;
  const off = (rate - law) / error;
  const words = `${Math.abs(off).toFixed(1)} standard errors ${off < 0 ? "below" : "above"} the law`;
  if (checked < 100) return ["undecided", "?", "too few nonces to say"];
  if (Math.abs(off) <= 2) return ["pass", "✓", words];
  return Math.abs(off) <= 4 ? ["undecided", "?", words] : ["fail", "✕", words];
}
