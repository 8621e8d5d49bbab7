(function (box) {
  var pictures = Array.from(box.querySelectorAll("figure")), control = box.querySelector(".control");
  var slider = control.querySelector("input"), output = control.querySelector("output");
  function show() {
    pictures.forEach(function (figure, index) { figure.classList.toggle("off", index !== Number(slider.value)); });
    output.textContent = pictures[slider.value].dataset.s;
    slider.setAttribute("aria-valuetext", "s = " + output.textContent);
  }
  slider.addEventListener("input", show);
  control.hidden = false;
  show();
})(document.currentScript.parentElement);
