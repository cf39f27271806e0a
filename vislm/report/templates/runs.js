"use strict";
(() => {
  const browsers = [...document.querySelectorAll(".filters")].map((form) => {
    const section = form.closest(".part");
    const cards = [...section.querySelectorAll(".card")];
    const texts = new Map(cards.map((card) => [card, card.textContent.toLowerCase()]));
    const chips = [...form.querySelectorAll("button[data-show]")];
    const chosen = (name) => form.querySelector(`select[data-filter=${name}]`)?.value ?? "";
    const search = form.querySelector("input[type=search]");
    const veil = form.querySelector("input[data-veil]");
    const count = form.querySelector("output");
    let show = "";

    function fits(card) {
      const part = chosen("part"), group = chosen("group");
      if (show === "flipped" ? !card.hasAttribute("data-flipped") : show && card.dataset.state !== show) return false;
      if (part && !card.dataset.parts.includes(` ${part} `)) return false;
      if (group && card.dataset.group !== group) return false;
      return search.value.toLowerCase().split(/\s+/).every((word) => texts.get(card).includes(word));
    }
    function update() {
      let left = 0;
      for (const card of cards) {
        card.hidden = !fits(card);
        left += card.hidden ? 0 : 1;
      }
      for (const chip of chips) chip.setAttribute("aria-pressed", String(chip.dataset.show === show));
      count.textContent = left === cards.length ? "" : `${left} shown.`;
    }
    for (const chip of chips) {
      chip.addEventListener("click", () => {
        show = chip.dataset.show;
        update();
      });
    }
    form.addEventListener("input", update);
    form.addEventListener("submit", (event) => event.preventDefault());
    veil?.addEventListener("change", () => section.classList.toggle("clear", !veil.checked));
    form.hidden = false;
    update();
    return { section, search, veil, cards };
  });

  function current() {
    const middle = window.innerHeight / 2;
    const near = browsers.find(({ section }) => {
      const box = section.getBoundingClientRect();
      return box.top <= middle && box.bottom >= middle;
    });
    return browsers.find(({ section }) => section.contains(document.activeElement)) ?? near ?? browsers[0];
  }
  function step(browser, by) {
    const cards = browser.cards.filter((card) => !card.hidden);
    if (!cards.length) return;
    const at = cards.indexOf(document.activeElement.closest(".card"));
    const next = at < 0 ? (by > 0 ? 0 : cards.length - 1) : Math.min(Math.max(at + by, 0), cards.length - 1);
    cards[next].focus({ preventScroll: true });
    cards[next].scrollIntoView({ block: "nearest" });
  }
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !browsers.length) return;
    const writing = event.target.matches("input[type=search], select");
    if (event.key === "Escape" && writing) return event.target.blur();
    if (writing) return;
    const browser = current();
    if (event.key === "j") step(browser, 1);
    else if (event.key === "k") step(browser, -1);
    else if (event.key === "/") {
      event.preventDefault();
      browser.search.focus();
    } else if (event.key === "t" && browser.veil) browser.veil.click();
  });
})();
