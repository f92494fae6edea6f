"use strict";
// A page that is served while its run goes: it asks for the run's version and takes over what has changed.
(() => {
const SECTIONS = ["head", "results", "tables", "rl", "time", "sft", "milestones", "config"];
const live = document.getElementById("live");
let version = live.dataset.version;

async function ask(path) {
  const reply = await fetch(path, {cache: "no-store"});
  if (!reply.ok) throw new Error(reply.statusText);
  return reply.text();
}

async function renew() {
  try {
    const now = await ask("version");
    live.classList.remove("lost");
    if (now === version) return;
    const page = new DOMParser().parseFromString(await ask("page"), "text/html");
    for (const id of SECTIONS) {
      const old = document.getElementById(id), fresh = page.getElementById(id);
      if (old && fresh) old.replaceChildren(...fresh.childNodes);
    }
    const data = page.getElementById("trajectories-data"), block = document.getElementById("trajectories-data");
    if (data && block) { block.textContent = data.textContent; document.dispatchEvent(new Event("renewed")); }
    else if (data) location.reload();  // the first trajectories have come
    live.textContent = page.getElementById("live").textContent;
    version = now;
  } catch (error) {
    live.classList.add("lost");
    live.textContent = "The run cannot be read: the page shows what it had last.";
  }
}
setInterval(renew, Number(live.dataset.everyMs));
})();
