// How fresh the page is: its corner, its title, the form for a key, and the feed that all of them follow.

/**
 * Follows a feed and says how things stand.
 *
 * show(snapshot) shows a snapshot, and returns false if it cannot; title() names the page while snapshots come;
 * locked says what a key would show.
 */
class Link {
  #show;
  #title;
  #locked;
  #feed;
  #now = { state: "connecting" };
  #shown = false;
  #seenAt = 0; // by the clock of this machine, which the service's may differ from

  constructor(url, { show, title, locked }) {
    this.#show = show;
    this.#title = title;
    this.#locked = locked;
    this.#feed = new Feed(url, (snapshot) => this.#take(snapshot), (now) => this.#follow(now));
    $("key-form").addEventListener("submit", (event) => this.#useKey(event));
    $("forget").addEventListener("click", () => {
      this.#feed.useKey("");
      location.reload();
    });
    addEventListener("online", () => this.#feed.retryNow());
    document.addEventListener("visibilitychange", () => document.hidden || this.#now.state !== "lost" || this.#feed.retryNow());
    setInterval(() => this.#showFreshness(), 1000);
  }

  run() {
    return this.#feed.run();
  }

  #take(snapshot) {
    this.#seenAt = Date.now() / 1000;
    if (this.#show(snapshot) !== false) this.#shown = true;
    this.#showFreshness();
  }

  #follow(now) {
    const before = this.#now.state;
    this.#now = now;
    document.body.dataset.link = now.state;
    const { hasKey } = this.#feed;
    if (now.state === "key") put("key-reason", hasKey ? `That key was refused: ${now.reason}.` : "A key that may read is enough.");
    const asks = now.state === "key" || (now.state === "connecting" && !$("key-form").hidden && !this.#shown);
    $("key-form").hidden = !asks;
    $("main").hidden = asks;
    $("forget").hidden = !hasKey || asks;
    $("metrics").hidden = hasKey || asks; // a link cannot carry a key
    if (now.state === "key" && before !== "key") {
      put("state", "Locked");
      showSentence("", this.#locked);
      $("key").focus();
    }
    this.#showFreshness();
    const said = { live: "Connected.", stale: "The service is silent.", lost: "Disconnected.", key: "A key is needed." };
    if (before !== now.state) put("spoken", said[now.state] ?? "");
  }

  /** The corner of the page and the title; once a second, because a wait is counted down. */
  #showFreshness() {
    const words = { connecting: "Connecting", live: "Live", stale: "Stale", lost: "Disconnected", key: "Key needed" };
    const { state, reason, retryAt } = this.#now;
    put("link-text", words[state]);
    if (state === "live") {
      if (this.#shown) document.title = `${this.#title()} · assay`;
      return;
    }
    document.title = `${words[state]} · assay`;
    if (state !== "stale" && state !== "lost") return;
    const since = this.#shown ? ` What you see is ${duration(Date.now() / 1000 - this.#seenAt)} old.` : "";
    const next = retryAt ? ` Next attempt in ${Math.max(1, Math.ceil((retryAt - Date.now()) / 1000))}${THIN}s.` : "";
    const why = state === "stale" ? "The connection is open, but nothing comes." : `No connection: ${reason}.`;
    if (!this.#shown) put("state", "No connection");
    showSentence("fail", why + since + next);
  }

  #useKey(event) {
    event.preventDefault();
    const key = $("key").value.trim();
    $("key").value = "";
    if (/^[\x21-\x7e]+$/.test(key)) this.#feed.useKey(key);
    else put("key-reason", "A key has only visible ASCII characters.");
  }
}
