#!/usr/bin/env python3
"""A QUIC server and client, of aioquic: each stream is sent back as it came.

server ADDRESS PORT DIRECTORY   DIRECTORY gets a certificate
client ADDRESS PORT             sends a stream; then one for each line of its input, and says `echoed` after each
"""

import asyncio
import datetime
import os
import ssl
import sys
from pathlib import Path

from aioquic.asyncio import QuicConnectionProtocol, connect, serve
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import QuicEvent, StreamDataReceived
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

ALPN = ["echo"]
SIZE = 100_000


class Echo(QuicConnectionProtocol):
    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, StreamDataReceived):
            self._quic.send_stream_data(event.stream_id, event.data, event.end_stream)
            self.transmit()


def certificate(directory: Path) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "echo.test")])
    now = datetime.datetime.now(datetime.timezone.utc)
    day = datetime.timedelta(days=1)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now - day, now + day)
    public, private = directory / "certificate.pem", directory / "key.pem"
    public.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    pkcs8 = serialization.PrivateFormat.PKCS8
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, pkcs8, plain))
    return public, private


async def server(address: str, port: int, directory: Path) -> None:
    configuration = QuicConfiguration(is_client=False, alpn_protocols=ALPN)
    configuration.load_cert_chain(*certificate(directory))
    await serve(address, port, configuration=configuration, create_protocol=Echo)
    await asyncio.Future()


async def client(address: str, port: int) -> None:
    configuration = QuicConfiguration(alpn_protocols=ALPN, verify_mode=ssl.CERT_NONE)
    async with connect(address, port, configuration=configuration) as connection:
        while True:
            reader, writer = await connection.create_stream()
            sent = os.urandom(SIZE)
            writer.write(sent)
            writer.write_eof()
            assert await reader.read() == sent
            print("echoed", flush=True)
            if not await asyncio.to_thread(sys.stdin.readline):
                return


if sys.argv[1] == "server":
    asyncio.run(server(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])))
else:
    asyncio.run(client(sys.argv[2], int(sys.argv[3])))
