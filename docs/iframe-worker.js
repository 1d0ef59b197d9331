// Browsers start no worker for a page that was opened from a folder. There the search runs in a
// hidden frame, which takes and gives the same messages. (The theme knows this file by its name.)
if (location.protocol === "file:") {
  const inside = (url) => `
    <body><script>
      window.postMessage = (data) => parent.postMessage(data, "*");
      window.importScripts = (...urls) => urls.reduce((before, url) => before.then(() =>
        new Promise((done) => {
          const script = document.createElement("script");
          script.src = url;
          script.onload = done;
          document.body.append(script);
        })), Promise.resolve());
    </script><script src="${url}"></script></body>`;

  window.Worker = window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      const { contentWindow, contentDocument } = this.frame;
      window.addEventListener("message", ({ source, data }) => {
        if (source !== contentWindow) return;
        const message = new MessageEvent("message", { data });
        this.dispatchEvent(message);
        this.onmessage?.(message);
      });
      contentDocument.open();
      contentDocument.write(inside(url));
      contentDocument.close();
      this.ready = new Promise((done) => contentWindow.addEventListener("load", done));
    }

    postMessage(data) {
      this.ready.then(() =>
        this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })));
    }

    terminate() {
      this.frame.remove();
    }
  };
}
