// js-libp2p 3 needs Promise.withResolvers, which Node.js has since 22.
Promise.withResolvers ??= function () {
  let resolve, reject
  const promise = new this((yes, no) => { resolve = yes; reject = no })
  return { promise, resolve, reject }
}
