// Gets the tokens for one copy from Node: sends schemas/mint-request.json, receives schemas/answer.json.
//
//   npm install
//   MINTER_BROKER_URL=amqps://dirac:…@broker/minter node mint.js davs://a/file davs://b/file
//
// The message is Celery's (protocol 2): headers `task` and `id`, body [[argument], {}, {}]. RabbitMQ checks
// that `userId` is the user of the connection; replies may go to queues named minter.reply.<client>.*.

const amqp = require("amqplib");
const { randomBytes } = require("crypto");

/** Return a UUIDv7 (RFC 9562 §5.7). Keep it: a second request with the same id gets the same tokens. */
function uuid7() {
  const bytes = randomBytes(16);
  bytes.writeUIntBE(Date.now(), 0, 6);
  bytes[6] = (bytes[6] & 0x0f) | 0x70;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  return bytes.toString("hex").replace(/(.{8})(.{4})(.{4})(.{4})(.{12})/, "$1-$2-$3-$4-$5");
}

async function mint(url, request) {
  const client = decodeURIComponent(new URL(url).username);
  const requests = `minter.requests.${client}`; // the client's own exchange; workers serve the clients in turn
  const connection = await amqp.connect(url);
  const channel = await connection.createConfirmChannel();
  const { queue } = await channel.assertQueue(`minter.reply.${client}.${uuid7()}`, {
    exclusive: true, autoDelete: true, durable: false,
  });
  const id = uuid7();
  const answered = new Promise((resolve, reject) => {
    setTimeout(() => reject(new Error("no answer within 60 s; the same request_id may be sent again")), 60000).unref();
    channel.consume(queue, (message) => {
      if (message.properties.correlationId === id) resolve(JSON.parse(message.content).result);
    }, { noAck: true });
  });
  channel.on("return", () => console.error(`queue ${requests} does not exist; run: minter broker setup`));
  channel.publish(requests, requests, Buffer.from(JSON.stringify([[request], {}, {}])), {
    contentType: "application/json", contentEncoding: "utf-8", persistent: true, mandatory: true,
    userId: client, replyTo: queue, correlationId: id, headers: { task: "minter.mint", id },
  });
  await channel.waitForConfirms();
  const answer = await answered;
  await connection.close();
  return answer;
}

async function main() {
  const [source, destination] = process.argv.slice(2);
  const answer = await mint(process.env.MINTER_BROKER_URL, {
    request_id: uuid7(),
    files: [{ sources: [source], destinations: [destination], size: 1000000000 }],
  });
  if (answer.error) {
    console.error(`${answer.error.reason}: ${answer.error.error_description}`);
    process.exit(1);
  }
  // A token is a secret: print what it is for, never the token itself.
  for (const t of answer.tokens ?? []) console.log(JSON.stringify({ side: t.side, scope: t.scope, jti: t.jti, exp: t.exp }));
  for (const r of answer.refusals ?? []) console.log(JSON.stringify({ side: r.side, refused: r.error.reason }));
}

main();
