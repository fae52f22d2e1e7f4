// Formulas that are wider than the page scroll sideways; let the keyboard reach them.
window.addEventListener("load", async () => {
  if (window.MathJax && MathJax.startup) await MathJax.startup.promise;
  for (const box of document.querySelectorAll("mjx-container[display='true']")) {
    if (box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight) box.tabIndex = 0;
  }
});
