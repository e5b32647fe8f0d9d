// What scrolls sideways can be reached and moved by keys.
const reachable = () => {
  for (const box of document.querySelectorAll(".bd-article :is(table, .formula)")) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
};
addEventListener("load", reachable);
addEventListener("resize", reachable);
