// npm oidc-provider as a plain issuer of JWTs for storages: what `/token` is compared with. It records nothing.
import { generateKeyPairSync } from "node:crypto";
import Provider from "oidc-provider";

const port = Number(process.argv[2]);
const issuer = `http://127.0.0.1:${port}`;
const { privateKey } = generateKeyPairSync("ec", { namedCurve: "P-256" });
const provider = new Provider(issuer, {
  jwks: { keys: [{ ...privateKey.export({ format: "jwk" }), kid: "bench", use: "sig", alg: "ES256" }] },
  clients: [
    {
      client_id: "load",
      client_secret: "secret",
      grant_types: ["client_credentials"],
      redirect_uris: [],
      response_types: [],
      id_token_signed_response_alg: "ES256",
    },
  ],
  features: {
    clientCredentials: { enabled: true },
    devInteractions: { enabled: false },
    resourceIndicators: {
      enabled: true,
      defaultResource: () => undefined,
      useGrantedResource: () => true,
      getResourceServerInfo: (ctx) => ({
        scope: String(ctx.oidc.params.scope),
        accessTokenFormat: "jwt",
        accessTokenTTL: 7200,
        jwt: { sign: { alg: "ES256" } },
      }),
    },
  },
  formats: { customizers: { jwt: (ctx, token, jwt) => Object.assign(jwt.payload, { "wlcg.ver": "1.0" }) } },
});
provider.listen(port, "127.0.0.1");
