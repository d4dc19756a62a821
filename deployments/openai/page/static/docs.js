// Swagger over this server's own description.

window.SwaggerUIBundle({
  url: new URL("openapi.json", document.baseURI).href,
  dom_id: "#swagger",
  deepLinking: true,
  validatorUrl: null,
});
