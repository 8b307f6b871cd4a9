// Signs the browser in and out, and sends the proof of the session (see serving/session.py) with each request of the page.
(() => {
  const PROOF = "relook-proof";
  const plainFetch = window.fetch.bind(window);
  const session = (verb, headers) =>
    plainFetch(new URL("v1/session", document.baseURI), { method: verb, headers, credentials: "same-origin" });

  window.fetch = (input, init) => {
    const request = new Request(input, init);
    const proof = localStorage.getItem(PROOF);
    if (proof && new URL(request.url).origin === location.origin) request.headers.set("X-Relook-Proof", proof);
    return plainFetch(request);
  };

  const say = (sentence) => { document.getElementById("rl-sign-in-problem").textContent = sentence; };

  document.addEventListener("submit", async (event) => {
    if (event.target.id !== "rl-sign-in-form") return;
    event.preventDefault();
    const field = event.target.querySelector("input");
    try {
      const response = await session("POST", { Authorization: `Bearer ${field.value.trim()}` });
      const body = await response.json();
      if (!response.ok) return say(`${body.detail}.`);
      localStorage.setItem(PROOF, body.proof);
      field.value = "";
      say("");
      document.getElementById("rl-signed-in").click();
    } catch {
      say("The service did not respond, or the key has characters that no key has.");
    }
  });

  // A link sends no proof, so with a session the print view is fetched and shown from memory.
  document.addEventListener("click", async (event) => {
    if (!event.target.matches?.("a.rl-print") || !localStorage.getItem(PROOF)) return;
    event.preventDefault();
    const tab = window.open("", "_blank");
    const response = await window.fetch(event.target.href, { credentials: "same-origin" });
    const page = new Blob([await response.text()], { type: response.ok ? "text/html" : "text/plain" });
    if (tab) tab.location = URL.createObjectURL(page);
  });

  document.addEventListener("click", async (event) => {
    if (event.target.id !== "rl-sign-out") return;
    localStorage.removeItem(PROOF);
    await session("DELETE", {}).catch(() => null);
    location.reload();
  });
})();
