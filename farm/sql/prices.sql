-- The price in force of each of :models for an account: its own before everybody's, of these the one that started last;
-- one for rendering, by whichever method, and one for reuse. Reads the key of price_books and prices_book_idx.
SELECT DISTINCT ON (b.model, b.method = 'reuse') p.id, b.model, p.method, p.rate
FROM price_books AS b
JOIN prices AS p ON p.book_id = b.id
WHERE b.model = ANY (CAST(:models AS text[])) AND b.currency = :currency
  AND (b.account_id IS NULL OR b.account_id = :account_id) AND p.valid @> now()
ORDER BY b.model, b.method = 'reuse', b.account_id NULLS LAST, lower(p.valid) DESC
