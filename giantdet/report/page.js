// A click on a picture shows it as large as the window allows; another click closes it.
const zoom = document.getElementById("zoom");
for (const image of document.querySelectorAll(".photo img")) {
  image.addEventListener("click", () => {
    zoom.firstElementChild.src = image.src;
    zoom.firstElementChild.alt = image.alt;
    zoom.showModal();
  });
}
zoom.addEventListener("click", () => zoom.close());
