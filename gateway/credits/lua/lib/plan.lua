-- The windows that follow from a plan's terms.

-- Move the account into the windows of now, as its plan has them. In memory only: a denial writes nothing.
local function roll(account, terms, now)
  local day = now - now % DAY_MS
  if day > account.day then account.day, account.day_used = day, 0 end
  local windows, lengths, ended = account.windows, '|', false
  for i = 1, #windows do
    lengths = lengths .. ',' .. windows[i].book
    ended = ended or now >= windows[i].finish
  end
  -- The terms are read only where they say something new.
  if ended or not string.find(terms, lengths .. '|', 1, true) then change_windows(account, terms, now) end
end

-- A change of plan counts at once: the windows grant what the new plan's do.
local function regrant(account, terms, now, postings)
  for i, term in ipairs(read_windows(terms)) do
    local window = account.windows[i]
    local _, _, grant = window_at(term, now)
    post(postings, 'granted:' .. window.book, window.granted - grant)
    post(postings, 'window:' .. window.book, grant - window.granted)
    window.granted, window.tail = grant, nil
  end
end
