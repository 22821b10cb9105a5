// Browsers start no workers for pages opened from the file system. There, the theme's search runs in a hidden frame
// instead: a frame of this page may load scripts beside it. (The theme's offline plugin would fetch such a script from
// another server; it leaves that when it finds one of this name.)
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.body.appendChild(document.createElement("iframe"));
      frame.hidden = true;
      const inner = (this.inner = frame.contentWindow);
      inner.postMessage = (data) => {
        const message = new MessageEvent("message", { data: structuredClone(data) });
        this.dispatchEvent(message);
        this.onmessage?.(message);
      };
      const load = (source) =>
        new Promise((done, failed) => {
          const script = inner.document.createElement("script");
          Object.assign(script, { src: source, onload: done, onerror: failed });
          inner.document.head.append(script);
        });
      inner.importScripts = async (...sources) => {
        for (const source of sources) await load(new URL(source, url));
      };
      this.ready = load(url);
      this.terminate = () => frame.remove();
    }

    async postMessage(data) {
      await this.ready;
      const message = new this.inner.MessageEvent("message", { data: structuredClone(data) });
      this.inner.dispatchEvent(message);
    }
  };
}
