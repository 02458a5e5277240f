/* The validator is a service elsewhere. */
SwaggerUIBundle({url: "openapi.json", dom_id: "#swagger-ui", validatorUrl: null, defaultModelsExpandDepth: 0})
