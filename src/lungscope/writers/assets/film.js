"use strict";
// Layers are switched by the style sheet alone; only the slider needs a script, and is not shown without one.
const slider = document.getElementById("opacity");
if (slider) {
  const show = () => {
    document.getElementById("heat").style.opacity = slider.value / 100;
    slider.nextElementSibling.textContent = slider.value + " %";
  };
  slider.parentElement.hidden = false;
  slider.addEventListener("input", show);
  show();
}
