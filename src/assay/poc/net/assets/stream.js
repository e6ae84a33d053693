// Reads the event stream with fetch, because an EventSource cannot send a key.

const SILENCE_MS = 4000; // no snapshot for so long: what is shown is stale
const GIVE_UP_MS = 12000; // and for so long: the connection is dead, whatever the network says
const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 8000;
const KEY_NAME = "assay.key";

/**
 * Follows the service for ever.
 *
 * onSnapshot gets every snapshot. onLink is told how things stand whenever that changes:
 *   {state: "connecting"}                 at the start
 *   {state: "live"}                       snapshots arrive
 *   {state: "stale"}                      the connection is open and silent
 *   {state: "lost", reason, retryAt}      there is none; retryAt is null while an attempt runs
 *   {state: "key", reason}                a key is needed, and the feed waits for useKey
 */
class Feed {
  #url;
  #onSnapshot;
  #onLink;
  #wake = () => {};
  #key = recall();

  constructor(url, onSnapshot, onLink) {
    this.#url = url;
    this.#onSnapshot = onSnapshot;
    this.#onLink = onLink;
  }

  get hasKey() {
    return this.#key !== "";
  }

  useKey(key) {
    this.#key = key;
    remember(key);
    this.#wake();
  }

  retryNow() {
    this.#wake();
  }

  async run() {
    this.#onLink({ state: "connecting" });
    for (let failures = 0; ; ) {
      const end = await this.#follow();
      if (end.needsKey) {
        this.#onLink({ state: "key", reason: end.reason });
        await this.#sleep(null);
        this.#onLink({ state: "connecting" });
        continue;
      }
      failures = end.received ? 1 : failures + 1;
      const pause = end.pause ?? pauseAfter(failures);
      this.#onLink({ state: "lost", reason: end.reason, retryAt: Date.now() + pause });
      await this.#sleep(pause);
      this.#onLink({ state: "lost", reason: end.reason, retryAt: null });
    }
  }

  /** Reads one connection to its end, and says how it ended. */
  async #follow() {
    const abort = new AbortController();
    let received = false;
    let timers = [];
    const listen = () => {
      timers.forEach(clearTimeout);
      timers = [
        setTimeout(() => received && this.#onLink({ state: "stale" }), SILENCE_MS),
        setTimeout(() => abort.abort(), GIVE_UP_MS),
      ];
    };
    listen();
    try {
      const response = await fetch(this.#url, {
        headers: this.#key ? { Authorization: `Bearer ${this.#key}` } : {},
        signal: abort.signal,
        cache: "no-store",
        redirect: "error",
      });
      if (!response.ok) return await refusal(response);
      for await (const data of events(response.body)) {
        const snapshot = JSON.parse(data);
        listen();
        received = true;
        this.#onLink({ state: "live" });
        this.#show(snapshot);
      }
      return { received, reason: "the service closed the connection" };
    } catch (error) {
      if (error instanceof SyntaxError) return { received, reason: "what the service sent could not be read" };
      return { received, reason: abort.signal.aborted ? "the service is silent" : "the service does not answer" };
    } finally {
      timers.forEach(clearTimeout);
      abort.abort();
    }
  }

  /** A fault of the page is one, and not a fault of the connection. */
  #show(snapshot) {
    try {
      this.#onSnapshot(snapshot);
    } catch (error) {
      reportError(error);
    }
  }

  #sleep(milliseconds) {
    return new Promise((resolve) => {
      const timer = milliseconds === null ? undefined : setTimeout(resolve, milliseconds);
      this.#wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }
}

/** Yields the data of each server-sent event of a body. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (pending + value).split("\n\n");
    pending = blocks.pop();
    for (const block of blocks) {
      const lines = block.split("\n").filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
    }
  }
}

async function refusal(response) {
  const problem = await response.json().catch(() => ({}));
  const reason = String(problem.detail ?? `HTTP ${response.status}`);
  if (response.status === 401 || response.status === 403) return { needsKey: true, reason };
  const after = Number(response.headers.get("Retry-After"));
  return { reason, pause: after > 0 ? Math.min(after, 60) * 1000 : undefined };
}

/** Doubling, bounded, and up to half of it by chance, so that many pages do not come back at once. */
function pauseAfter(failures) {
  const longest = Math.min(LONGEST_PAUSE_MS, FIRST_PAUSE_MS * 2 ** (failures - 1));
  return longest * (0.5 + Math.random() / 2);
}

function recall() {
  try {
    return sessionStorage.getItem(KEY_NAME) ?? "";
  } catch {
    return ""; // storage is switched off: the key lives as long as the page
  }
}

function remember(key) {
  try {
    if (key) sessionStorage.setItem(KEY_NAME, key);
    else sessionStorage.removeItem(KEY_NAME);
  } catch {
    // see recall
  }
}
